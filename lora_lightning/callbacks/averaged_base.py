"""Lightning's weight averaging beside adapters: it averages what trains, and leaves the frozen base alone."""

from __future__ import annotations

from itertools import chain

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn

from lora_lightning.lora import is_adapted


def average_with_adapters(trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
    """Make callbacks that copied the model before it had adapters copy it again."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined] # Trainer sets it from elsewhere
        if isinstance(callback, WeightAveraging):
            averaged = callback._average_model
            if averaged is not None and not is_adapted(averaged):
                callback.setup(trainer, pl_module, stage)


@torch.no_grad()
def restore_averaged_base(trainer: Trainer, pl_module: LightningModule, adapted: nn.Module) -> None:
    """Give averaged copies the frozen values again.

    The mean of a number with itself, computed as `d x + (1 - d) x`, may be another number. Called before each time that the
    averaged model takes the place of the one in training, so that the base is never but itself.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        averaged = callback._average_model if isinstance(callback, WeightAveraging) else None
        if averaged is None:
            continue
        frozen = {id(buffer) for buffer in adapted.buffers()} | {
            id(p) for p in adapted.parameters() if not p.requires_grad
        }
        copies = chain(averaged.module.parameters(), averaged.module.buffers())
        for copy, own in zip(copies, chain(pl_module.parameters(), pl_module.buffers()), strict=True):
            if id(own) in frozen:
                copy.data.copy_(own.data)
