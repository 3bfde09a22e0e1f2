"""Defines `LearningRateFactor`, which multiplies the learning rates of a run."""

from __future__ import annotations

from math import isfinite
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override


class LearningRateFactor(Callback):
    """Multiplies the learning rate of every parameter group of every optimizer during each of its steps.

    Between the steps, the groups have their own learning rates. So any scheduler works as without this callback,
    including one with absolute rates such as `OneCycleLR(max_lr)`, and loggers and checkpoints show the rates without
    the factor. A resumed run needs the callback again.

    Args:
        factor: The factor.

    Raises:
        ValueError: If the factor is not a positive number. In `fit`, if a group has no learning rate.
    """

    def __init__(self, factor: float) -> None:
        if not (isfinite(factor) and factor > 0):
            raise ValueError(f"factor={factor!r}: expected a positive number.")
        self.factor = factor
        self.steps = 0
        self._handles: list[RemovableHandle] = []
        self._rates: dict[int, list[float | Tensor]] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()
        for optimizer in trainer.optimizers:
            if any(group.get("lr") is None for group in optimizer.param_groups):
                raise ValueError(f"{type(optimizer).__name__} has no learning rate that can be multiplied.")
            self._handles += [
                optimizer.register_step_pre_hook(self._multiply),
                optimizer.register_step_post_hook(self._restore),
            ]

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()

    def _multiply(self, optimizer: Optimizer, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.steps += 1
        self._rates[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.factor  # not in place: the rate may be a tensor

    def _restore(self, optimizer: Optimizer, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        rates = self._rates.pop(id(optimizer))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
