"""Lets the adapter folder hold what the best checkpoint holds, where a metric was monitored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from lora_lightning.lora import is_adapter_key, saved_keys


@dataclass(frozen=True)
class Best:
    """Names a checkpoint, and the metric by which it is the best.

    Args:
        path: The checkpoint.
        monitor: Name of the metric.
        score: Its value there.
    """

    path: str
    monitor: str
    score: float

    @property
    def metrics(self) -> dict[str, float]:
        """Return the metric by its name without the stage."""
        return {self.monitor.removeprefix("val/").removeprefix("val_"): self.score}

    def in_words(self) -> str:
        """Return where it comes from: `of epoch=3-step=40.ckpt, the best by val/accuracy: 0.97`."""
        return f"of {Path(self.path).name}, the best by {self.monitor}: {self.score:.4g}"


def best_of(trainer: Trainer) -> Best | None:
    """Return the best checkpoint of a training; `None` if nothing was monitored or saved, or if checkpoints are sharded."""
    files = trainer.checkpoint_callback
    if not isinstance(files, ModelCheckpoint) or isinstance(trainer.strategy, ModelParallelStrategy):
        return None
    if files.monitor is None or not files.best_model_path or files.best_model_score is None:
        return None
    return Best(files.best_model_path, files.monitor, float(files.best_model_score))


@contextmanager
def trained_as_in(best: Best | None, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Give the adapters, and what is trained in full, the values in a checkpoint within this context."""
    if best is None:
        yield
        return
    loaded = trainer.strategy.checkpoint_io.load_checkpoint(best.path)["state_dict"]
    whole = saved_keys(pl_module)
    own = {key: value for key, value in pl_module.state_dict().items() if is_adapter_key(key) or key in whole}
    kept = {key: value.clone() for key, value in own.items()}
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(loaded[key])
    try:
        yield
    finally:
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(kept[key])
