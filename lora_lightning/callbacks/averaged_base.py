"""Lightning's weight averaging beside adapters: it averages what trains, and leaves the frozen base alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn

from lora_lightning.lora import is_adapted
from lora_lightning.lora.freeze import FrozenStatistics


def average_with_adapters(trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
    """Make callbacks that copied the model before it had adapters copy it again."""
    for callback, averaged in _averaged(trainer):
        if not is_adapted(averaged):
            callback.setup(trainer, pl_module, stage)


@torch.no_grad()
def restore_averaged_base(trainer: Trainer, pl_module: LightningModule, adapted: nn.Module) -> None:
    """Give averaged copies the frozen values again.

    The mean of a number with itself, computed as `d x + (1 - d) x`, may be another number. Called before each time that the
    averaged model takes the place of the one in training, so that the base is never but itself.
    """
    for _, averaged in _averaged(trainer):
        frozen = {id(buffer) for buffer in adapted.buffers()} | {
            id(p) for p in adapted.parameters() if not p.requires_grad
        }
        copies = chain(averaged.parameters(), averaged.buffers())
        for copy, own in zip(copies, chain(pl_module.parameters(), pl_module.buffers()), strict=True):
            if id(own) in frozen:
                copy.data.copy_(own.data)


@torch.no_grad()
def restore_statistics(trainer: Trainer, pl_module: LightningModule) -> None:
    """Give frozen norm layers their statistics again, which `StochasticWeightAveraging` resets before its last epoch.

    It means to estimate them anew there, with the averaged weights. Frozen layers keep them: its copy of the model has them still.
    """
    for callback, averaged in _averaged(trainer):
        if isinstance(callback, StochasticWeightAveraging):
            for copy, own in zip(averaged.modules(), pl_module.modules(), strict=True):
                if isinstance(own, FrozenStatistics):
                    for name, buffer in own.named_buffers(recurse=False):
                        buffer.copy_(copy.get_buffer(name))


def _averaged(trainer: Trainer) -> Iterator[tuple[WeightAveraging | StochasticWeightAveraging, nn.Module]]:
    """Yield the callbacks that average weights, with their copies of the model."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined] # Trainer sets it from elsewhere
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            yield callback, callback._average_model.module
        if isinstance(callback, StochasticWeightAveraging) and callback._average_model is not None:
            yield callback, callback._average_model
