"""Prints progress for a pipe or a log file, where a bar cannot be redrawn."""

from __future__ import annotations

import time
from math import isfinite
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from typing_extensions import override

from lora_lightning.report.terminal import show

_SECONDS = 10.0


class ProgressLines(ProgressBar):
    """Prints a plain line every ten seconds: the stage, the epoch, the batch, and the metrics for the progress bar."""

    def __init__(self) -> None:
        super().__init__()
        self._last = time.monotonic()

    @override
    def disable(self) -> None:
        """Disable printing, as on all devices except the first."""
        self._last = float("inf")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._show(trainer, pl_module, "train", batch_idx, trainer.num_training_batches)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking:
            self._show(trainer, pl_module, "validate", batch_idx, trainer.num_val_batches[dataloader_idx])

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._show(trainer, pl_module, "test", batch_idx, trainer.num_test_batches[dataloader_idx])

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._show(trainer, pl_module, "predict", batch_idx, trainer.num_predict_batches[dataloader_idx])

    def _show(self, trainer: Trainer, pl_module: LightningModule, stage: str, batch: int, batches: float) -> None:
        if time.monotonic() - self._last < _SECONDS:
            return
        self._last = time.monotonic()
        of = f" of {batches}" if isfinite(batches) else ""
        metrics = self.get_metrics(trainer, pl_module)
        shown = "".join(f", {name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float))
        show(
            f"{stage}: epoch {trainer.current_epoch}, batch {batch + 1}{of}{shown}",
            soft_wrap=True,
            markup=False,
        )
