"""Supports Lightning's weight averaging with adapters: only trained parameters are averaged."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from lora_lightning.callbacks.adapted_part import adapted_part
from lora_lightning.lightning_packages import is_a
from lora_lightning.lora import is_adapted
from lora_lightning.lora.freeze import FrozenStatistics


class AveragedBase(Callback):
    """Restores the frozen base wherever callbacks average weights, before averages replace those of the model."""

    def __init__(self) -> None:
        self._adapted: nn.Module | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._adapted = adapted_part(pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:  # after the other callbacks have started the epoch
            _restore_statistics(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._restore(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._adapted = None

    @torch.no_grad()
    def _restore(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the frozen values in averaged copies of the model.

        The average of a number with itself, computed as `d x + (1 - d) x`, can differ from the number.
        """
        for _, averaged in _averaged(trainer):
            assert self._adapted is not None
            frozen = {id(buffer) for buffer in self._adapted.buffers()} | {
                id(p) for p in self._adapted.parameters() if not p.requires_grad
            }
            copies = chain(averaged.parameters(), averaged.buffers())
            for copy, own in zip(copies, chain(pl_module.parameters(), pl_module.buffers()), strict=True):
                if id(own) in frozen:
                    copy.data.copy_(own.data)


def average_with_adapters(trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
    """Let callbacks that copied the model before it was adapted copy it again."""
    for callback, averaged in _averaged(trainer):
        if not is_adapted(averaged):
            _copy_again(callback, trainer, pl_module, stage)


def _copy_again(
    callback: WeightAveraging | StochasticWeightAveraging, trainer: Trainer, pl_module: LightningModule, stage: str
) -> None:
    if is_a(callback, WeightAveraging):
        # Not its setup, which would call configure_model again, and may get new layers without adapters.
        device = callback._device or pl_module.device
        callback._average_model = AveragedModel(
            model=pl_module, device=device, use_buffers=callback._use_buffers, **callback._kwargs
        )
        return
    callback.setup(trainer, pl_module, stage)


@torch.no_grad()
def _restore_statistics(trainer: Trainer, pl_module: LightningModule) -> None:
    """Restore the statistics of frozen norm layers, which `StochasticWeightAveraging` resets before its last epoch.

    The callback would estimate new statistics for the averaged weights. Its copy of the model still has the original
    ones.
    """
    for callback, averaged in _averaged(trainer):
        if is_a(callback, StochasticWeightAveraging):
            for copy, own in zip(averaged.modules(), pl_module.modules(), strict=True):
                if isinstance(own, FrozenStatistics):
                    for name, buffer in own.named_buffers(recurse=False):
                        buffer.copy_(copy.get_buffer(name))


def _averaged(trainer: Trainer) -> Iterator[tuple[WeightAveraging | StochasticWeightAveraging, nn.Module]]:
    """Yield the callbacks that average weights and their copies of the model."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined] # Trainer sets it from elsewhere
        if is_a(callback, WeightAveraging) and callback._average_model is not None:
            yield callback, callback._average_model.module
        if is_a(callback, StochasticWeightAveraging) and callback._average_model is not None:
            yield callback, callback._average_model
