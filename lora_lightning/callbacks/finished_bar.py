"""Ends a progress bar before something is said that has to stay on the terminal."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich import get_console

from lora_lightning.lightning_packages import is_a


def finish_bar(trainer: Trainer, pl_module: LightningModule) -> None:
    """End the bar of Rich, which draws itself again over lines that were printed below it.

    A trainer does the same after the hooks of the other callbacks.
    """
    bar = trainer.progress_bar_callback
    if is_a(bar, RichProgressBar) and get_console().is_terminal:
        bar.teardown(trainer, pl_module, str(trainer.state.fn))
