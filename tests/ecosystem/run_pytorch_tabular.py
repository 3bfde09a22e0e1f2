"""pytorch-tabular: a category embedding model, trained on from the weights of another.

The best epoch is read back into it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig
from steps import Last, Run, copy_of, main


def table(shift: float) -> pd.DataFrame:
    values = np.random.default_rng(0).normal(size=(96, 4)).astype("float32")
    table = pd.DataFrame(values, columns=[*"abcd"])
    return table.assign(city=[*"xyz"] * 32, target=table["a"] - shift * table["b"])


def model(folder: Path) -> TabularModel:
    return TabularModel(
        data_config=DataConfig(target=["target"], continuous_cols=[*"abcd"], categorical_cols=["city"]),
        model_config=CategoryEmbeddingModelConfig(task="regression", layers="16-16"),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            max_epochs=2, batch_size=16, accelerator="cpu", progress_bar="none", checkpoints_path=str(folder / "best"),
            trainer_kwargs={"default_root_dir": str(folder)},
        ),
    )  # fmt: skip


def predict(trained: TabularModel) -> np.ndarray:
    return trained.predict(table(1.0)).to_numpy()


def fit(folder: Path) -> Run:
    from lora_lightning import LoRAFinetuning

    base = model(folder)
    base.fit(table(1.0))
    torch.save(base.model.state_dict(), folder / "base.pt")

    callback, last = LoRAFinetuning(rank=4, checkpoints="full", base_checkpoint=folder / "base.pt"), Last()
    tuned = model(folder)
    tuned.fit(table(-3.0), callbacks=[callback, last])
    tuned.evaluate(table(-3.0))
    predictions = predict(tuned)
    tuned.callbacks = []  # save_model pickles them, too
    tuned.save_model(str(folder / "tuned"))
    return Run(callback, copy_of(base.model.state_dict()), last, predict(base), predictions)


def load(folder: Path) -> dict[str, Any]:
    return {"load_model": predict(TabularModel.load_model(str(folder / "tuned")))}


if __name__ == "__main__":
    main(fit, load, "pytorch-tabular", "pytorch-lightning")
