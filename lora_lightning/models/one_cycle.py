"""`OneCycle`: a learning-rate schedule that needs no number of steps."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

_WARM_UP = 0.3
_START, _END = 1 / 25, 1 / 250_000


class OneCycle(LRScheduler):
    """One cycle over the whole run: up for 30 % of the steps, then down to almost nothing, both along a cosine.

    The one-cycle policy (Smith and Topin, https://arxiv.org/abs/1708.07120) with the constants of
    `torch.optim.lr_scheduler.OneCycleLR`, but for the momentum, which is left alone. The optimizer's own learning rate
    is the highest. `Classifier` tells it how many steps the run has; stepped after every training step.

    Args:
        optimizer: Its learning rate, or those of its groups, are the peak.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.total_steps = 1
        super().__init__(optimizer)

    def spread_over(self, total_steps: int) -> None:
        """Fit the cycle to a run of this many steps."""
        self.total_steps = total_steps

    @override
    def get_lr(self) -> list[float | Tensor]:
        factor = _factor(self.last_epoch / max(self.total_steps - 1, 1))
        return [base * factor for base in self.base_lrs]


def _factor(progress: float) -> float:
    """Return the share of the peak learning rate, for a progress of 0 (first step) to 1 (last step, and beyond)."""
    if progress <= _WARM_UP:
        return _cosine(_START, 1, progress / _WARM_UP)
    return _cosine(1, _END, min((progress - _WARM_UP) / (1 - _WARM_UP), 1))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
