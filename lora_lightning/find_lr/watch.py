"""Defines callbacks that measure a short run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from statistics import mean
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    EarlyStopping,
    LearningRateFinder,
    ModelSummary,
    ProgressBar,
    Timer,
)
from lightning.pytorch.cli import SaveConfigCallback
from torch import Tensor
from typing_extensions import override

from lora_lightning.callbacks import ComparisonReport, ConfusionReport, PredictionWriter
from lora_lightning.lightning_packages import is_a

LOSS_OF_STEPS = "validation loss"
"""Name of the mean loss of the validation steps, for modules that log none."""
NO_VALIDATION = "Learning rates are judged on validation data, but there are none."
_LEFT_OUT: tuple[type[Callback], ...] = (
    BatchSizeFinder,
    Checkpoint,
    ComparisonReport,
    ConfusionReport,
    EarlyStopping,
    LearningRateFinder,
    ModelSummary,
    PredictionWriter,
    ProgressBar,
    SaveConfigCallback,
    Timer,
)
_NAMES = ("val/loss", "val_loss", "valid/loss", "valid_loss", "validation/loss", "validation_loss", "loss/val")


def is_left_out(callback: Callback) -> bool:
    """Return whether a callback writes files, shows progress or stops a run, and does not affect training otherwise."""
    return any(is_a(callback, kind) for kind in _LEFT_OUT)


class Length(Callback):
    """Reads the number of steps of a configured `fit`, and ends it before its first step."""

    def __init__(self) -> None:
        self.steps: float = 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps = trainer.estimated_stepping_batches
        trainer.fit_loop.epoch_loop.max_steps = 0


class Watch(Callback):
    """Records the losses of a run, and ends it after a number of steps with a validation.

    Args:
        steps: The number of steps.
        monitor: Name of the validation loss. `None` looks for one.
        originals: Parameters that no optimizer may have.
    """

    def __init__(self, steps: int, monitor: str | None, originals: Iterable[Tensor]) -> None:
        self.steps = steps
        self.monitor = monitor
        self.curve: list[float] = []
        self.rate = float("nan")
        self.loss: float | None = None
        self.diverged = False
        self._originals = set(map(id, originals))
        self._of_batches: list[float] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined] # Trainer sets it from elsewhere
        # The module may have added some.
        trainer.callbacks = [each for each in callbacks if not is_left_out(each)]  # type: ignore[attr-defined]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:
            raise ValueError(NO_VALIDATION)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if any(id(parameter) in self._originals for group in groups for parameter in group["params"]):
            raise ValueError(
                "The optimizer of a copy of the module has parameters of the module itself, which the sweep would "
                "change: configure_optimizers should use self.parameters()."
            )
        if groups:
            self.rate = float(groups[0].get("max_lr", groups[0].get("initial_lr", groups[0]["lr"])))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = _loss_in(outputs)
        if loss is not None:
            self.curve.append(loss)
            self.diverged = self.diverged or not isfinite(loss)
        if self.diverged or trainer.global_step >= self.steps:
            trainer.should_stop = True  # with max_steps alone there would be no validation within an epoch

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._of_batches = []

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
        loss = _loss_in(outputs)
        if loss is not None:
            self._of_batches.append(loss)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        is_last = trainer.state.fn != "fit" or trainer.should_stop
        if not is_last:
            return
        metrics = trainer.callback_metrics
        self.monitor = self.monitor or _loss_name(metrics) or (LOSS_OF_STEPS if self._of_batches else None)
        if self.monitor == LOSS_OF_STEPS and self._of_batches:
            self.loss = mean(self._of_batches)
        elif self.monitor in metrics:
            self.loss = float(metrics[self.monitor])
        else:
            known = ", ".join(sorted(metrics)) or "none"
            raise ValueError(
                f"There is no validation loss (monitor={self.monitor!r}; logged metrics: {known}). Log one as "
                "val_loss, return it from validation_step, or name a metric as monitor."
            )


def _loss_in(outputs: object) -> float | None:
    """Return the loss in the outputs of a step, if any."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return float(loss.detach().float().mean()) if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _loss_name(metrics: Mapping[str, Tensor]) -> str | None:
    """Return the name of the validation loss among logged metrics, if any."""
    likely = sorted(name for name in metrics if "val" in name.lower() and "loss" in name.lower())
    return next((name for name in (*_NAMES, *likely) if name in metrics), None)
