"""GluonTS: a feed-forward forecaster, trained on from a predictor; the best epoch is read back into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gluonts.dataset.common import ListDataset
from gluonts.model.predictor import Predictor
from gluonts.torch import SimpleFeedForwardEstimator
from steps import Last, Run, copy_of, main


def series(frequency: float) -> ListDataset:
    values = 2 + np.sin(frequency * np.arange(120))
    return ListDataset([{"start": "2024-01-01", "target": values}], freq="D")


def estimator(folder: Path, *callbacks: Any) -> SimpleFeedForwardEstimator:
    trainer = {"max_epochs": 2, "default_root_dir": folder, "callbacks": list(callbacks), "accelerator": "cpu"}
    return SimpleFeedForwardEstimator(
        prediction_length=4, context_length=12, hidden_dimensions=[16, 16], lr=1e-2, num_batches_per_epoch=10,
        trainer_kwargs={**trainer, "enable_progress_bar": False},
    )  # fmt: skip


def predict(predictor: Any) -> np.ndarray:
    torch.manual_seed(0)  # the forecast consists of samples
    (forecast,) = predictor.predict(series(0.3))
    return forecast.mean


def fit(folder: Path) -> Run:
    from lora_lightning import LoRAFinetuning

    base = estimator(folder).train(series(0.3))
    callback, last = LoRAFinetuning(rank=4, checkpoints="full"), Last()
    tuned = estimator(folder, callback, last).train_from(base, series(0.7))
    predictions = predict(tuned)
    (folder / "tuned").mkdir()
    tuned.serialize(folder / "tuned")
    return Run(callback, copy_of(base.network.state_dict()), last, predict(base), predictions)


def load(folder: Path) -> dict[str, Any]:
    return {"deserialize": predict(Predictor.deserialize(folder / "tuned"))}


if __name__ == "__main__":
    main(fit, load, "gluonts", "pytorch-lightning")
