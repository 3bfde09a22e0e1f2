"""darts: TiDE on a sine wave, which keeps the best epoch by the validation loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from darts import TimeSeries
from darts.models import TiDEModel
from steps import Last, Run, copy_of, main


def series(frequency: float) -> TimeSeries:
    return TimeSeries.from_values(np.sin(frequency * np.arange(120, dtype=np.float32)))


def model(folder: Path, name: str, **trainer: Any) -> TiDEModel:
    return TiDEModel(
        input_chunk_length=12, output_chunk_length=4, hidden_size=16, n_epochs=2, batch_size=16, random_state=0,
        save_checkpoints=True, work_dir=str(folder), model_name=name, optimizer_kwargs={"lr": 1e-2},
        pl_trainer_kwargs={"accelerator": "cpu", "enable_progress_bar": False, **trainer},
    )  # fmt: skip


def predict(trained: TiDEModel) -> np.ndarray:
    return trained.predict(n=4, series=series(0.3)).values()


def fit(folder: Path) -> Run:
    from lora_lightning import LoRAFinetuning

    base = model(folder, "base")
    base.fit(series(0.3), val_series=series(0.3))
    base.save(str(folder / "base.pt"))

    callback, last = LoRAFinetuning(rank=4, checkpoints="full"), Last()
    tuned = model(folder, "tuned", callbacks=[callback, last])
    tuned.load_weights(str(folder / "base.pt"))
    tuned.fit(series(0.7), val_series=series(0.7), load_best=True)
    predictions = predict(tuned)
    tuned.save(str(folder / "tuned.pt"), clean=True)
    return Run(callback, copy_of(base.model.state_dict()), last, predict(base), predictions)


def load(folder: Path) -> dict[str, Any]:
    return {"load": predict(TiDEModel.load(str(folder / "tuned.pt")))}


if __name__ == "__main__":
    main(fit, load, "darts", "pytorch-lightning")
