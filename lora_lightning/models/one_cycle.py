"""Defines `OneCycle`, a learning-rate schedule that does not need the number of steps."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

_WARM_UP = 0.3
_START, _END = 1 / 25, 1 / 250_000


class OneCycle(LRScheduler):
    """Increases the learning rate for 30 % of the run and then decreases it to almost zero, both along a cosine.

    This is the one-cycle policy (Smith and Topin, https://arxiv.org/abs/1708.07120) with the constants of
    `torch.optim.lr_scheduler.OneCycleLR`, except that the momentum is not changed. The peak is the learning rate of the
    optimizer. `Classifier` passes the number of steps of the run and steps the scheduler after every training step.

    Args:
        optimizer: The optimizer. The learning rates of its groups are the peaks.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.total_steps = 1
        super().__init__(optimizer)

    def spread_over(self, total_steps: int) -> None:
        """Set the number of steps of the cycle."""
        self.total_steps = total_steps

    @override
    def get_lr(self) -> list[float | Tensor]:
        factor = _factor(self.last_epoch / max(self.total_steps - 1, 1))
        return [base * factor for base in self.base_lrs]


def _factor(progress: float) -> float:
    """Return the fraction of the peak learning rate for a progress from 0 (first step) to 1 (last step and later)."""
    if progress <= _WARM_UP:
        return _cosine(_START, 1, progress / _WARM_UP)
    return _cosine(1, _END, min((progress - _WARM_UP) / (1 - _WARM_UP), 1))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
