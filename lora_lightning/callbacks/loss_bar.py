"""Defines `LossBar`, a progress bar for a narrow terminal."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override

_LOSSES = ("train/loss", "train_loss", "loss")


class LossBar(RichProgressBar):
    """Shows the training loss as the only metric, so that the bar fits a line of 80 columns."""

    @override
    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        shown = super().get_metrics(trainer, pl_module)
        name = next((name for name in _LOSSES if name in shown), None)
        return {} if name is None else {"loss": shown[name]}
