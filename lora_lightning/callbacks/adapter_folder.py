"""Writes the adapter folder at the end of training, from the best checkpoint if a metric was monitored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lora_lightning.callbacks.summary import stage_metrics
from lora_lightning.lightning_packages import is_a
from lora_lightning.lora.state import adapter_keys, saved_keys
from lora_lightning.peft_format.folder import AdapterFolder
from lora_lightning.report.files import free_name, write_to


def write_adapter_folder(
    trainer: Trainer, pl_module: LightningModule, adapted: nn.Module
) -> tuple[Path | str | None, str]:
    """Write the trained adapters to the folder of the run. All devices have to call this.

    Returns:
        The folder (`None` if the run has none), and a description of the checkpoint (empty for the last state).
    """
    folder = None if trainer.fast_dev_run else _run_folder(trainer)  # type: ignore[attr-defined] # set from elsewhere
    if folder is None:
        return None, ""
    place = trainer.strategy.broadcast(free_name(folder, "adapter"))
    data = type(trainer.datamodule).__name__ if trainer.datamodule else None  # type: ignore[attr-defined] # likewise
    best = _best_of(trainer) if trainer.is_global_zero else None
    metrics = stage_metrics(trainer, "val") if best is None else best.metrics
    with _trained_as_in(best, trainer, pl_module):
        content = AdapterFolder(adapted, data, metrics)  # gathers distributed tensors, on all devices
    if trainer.is_global_zero:
        write_to(place, content.write)
    return (place if "://" in place else Path(place)), (f", {best.in_words()}" if best else "")


def _run_folder(trainer: Trainer) -> str | None:
    """Return the folder of the run: the log folder, or else the folder of the checkpoints. All devices have to call this."""
    if trainer.loggers:
        return trainer.log_dir
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return None if folder is None else str(folder)


@dataclass(frozen=True)
class _Best:
    """Holds the best checkpoint and its metric.

    Args:
        path: The checkpoint.
        monitor: Name of the metric.
        score: Value of the metric.
    """

    path: str
    monitor: str
    score: float

    @property
    def metrics(self) -> dict[str, float]:
        """Return the metric under its name without the stage."""
        return {self.monitor.removeprefix("val/").removeprefix("val_"): self.score}

    def in_words(self) -> str:
        """Return a description: `of epoch=3-step=40.ckpt, the best by val/accuracy: 0.97`."""
        return f"of {Path(self.path).name}, the best by {self.monitor}: {self.score:.4g}"


def _best_of(trainer: Trainer) -> _Best | None:
    """Return the best checkpoint of a run, or `None` if no metric was monitored, nothing was saved, or checkpoints are sharded."""
    files = trainer.checkpoint_callback
    if not is_a(files, ModelCheckpoint) or is_a(trainer.strategy, ModelParallelStrategy):
        return None
    if files.monitor is None or not files.best_model_path or files.best_model_score is None:
        return None
    return _Best(files.best_model_path, files.monitor, float(files.best_model_score))


@contextmanager
def _trained_as_in(best: _Best | None, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Load the trained values from a checkpoint within this context."""
    if best is None:
        yield
        return
    loaded = trainer.strategy.checkpoint_io.load_checkpoint(best.path)["state_dict"]
    trained = adapter_keys(pl_module) | saved_keys(pl_module)
    own = {key: value for key, value in pl_module.state_dict().items() if key in trained}
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
