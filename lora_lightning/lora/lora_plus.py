"""LoRA+: a higher learning rate for B than for A (https://arxiv.org/abs/2402.12354)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lora_lightning.lora.model import adapted_weights
from lora_lightning.lora.state import adapter_parameters


def lora_plus_param_groups(module: nn.Module, lr: float, lr_ratio: float) -> list[dict[str, Any]]:
    """Return two parameter groups for an optimizer: B of every adapter at `lr * lr_ratio`, and all other trained parameters at `lr`.

    Args:
        module: A module with adapters.
        lr: Learning rate η_A.
        lr_ratio: Ratio λ = η_B / η_A, at least 1. The paper (section 4) recommends about 16.

    Raises:
        ValueError: If the ratio is out of range.

    Example::

        optimizer = torch.optim.AdamW(lora_plus_param_groups(net, lr=1e-4, lr_ratio=16))
    """
    check_lr_ratio(lr_ratio)
    ups = _ups(module)
    rest = [parameter for parameter in adapter_parameters(module) if id(parameter) not in ups]
    return [{"params": rest, "lr": lr}, {"params": list(ups.values()), "lr": lr * lr_ratio}]


def keep_lr_ratio(optimizer: torch.optim.Optimizer, module: nn.Module, lr_ratio: float) -> list[RemovableHandle]:
    """Multiply the learning rate of B of every adapter by `lr_ratio` in the steps of an existing optimizer.

    The parameter groups are split just before each step and restored after it. Schedulers, checkpoints and gradient clipping
    therefore see the original groups.

    Args:
        optimizer: An optimizer, which may also have parameters of other modules.
        module: A module with adapters.
        lr_ratio: Ratio λ = η_B / η_A, at least 1.

    Returns:
        Handles whose `remove()` restores the optimizer.

    Raises:
        ValueError: If the ratio is out of range.
    """
    check_lr_ratio(lr_ratio)
    groups = _SplitGroups(set(_ups(module)), lr_ratio)
    return [optimizer.register_step_pre_hook(groups.split), optimizer.register_step_post_hook(groups.put_back)]


def check_lr_ratio(lr_ratio: float) -> float:
    """Return the ratio if it is valid.

    Raises:
        ValueError: If it is not at least 1, or not finite.
    """
    if not 1 <= lr_ratio < float("inf"):
        raise ValueError(
            f"lr_ratio={lr_ratio!r}: expected the ratio of the learning rates of B and A, at least 1, for example 16."
        )
    return lr_ratio


def _ups(module: nn.Module) -> dict[int, nn.Parameter]:
    """Return the B of every adapter, by identity."""
    ups = [each.factors[1] for each in adapted_weights(module)]
    return {id(up): up for up in ups}


class _SplitGroups:
    """Holds the parameter groups of an optimizer during a step and otherwise."""

    def __init__(self, ups: set[int], lr_ratio: float) -> None:
        self.ups = ups
        self.lr_ratio = lr_ratio
        self.original: list[dict[str, Any]] = []
        self.without_b: list[dict[str, Any]] = []
        """For each group of `original`, a group without the B's. Changes by a step are copied back."""

    def split(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.put_back(optimizer)  # if the last step was interrupted
        self.original = optimizer.param_groups
        self.without_b = [self._part(group, of_b=False) for group in self.original]
        of_b = [self._part(group, of_b=True) for group in self.original]
        optimizer.param_groups = [group for group in (*self.without_b, *of_b) if group["params"]]

    def put_back(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self.original:
            return
        for group, part in zip(self.original, self.without_b, strict=True):
            group.update({key: value for key, value in part.items() if key != "params"})
        optimizer.param_groups, self.original, self.without_b = self.original, [], []

    def _part(self, group: dict[str, Any], of_b: bool) -> dict[str, Any]:
        parameters = [parameter for parameter in group["params"] if (id(parameter) in self.ups) == of_b]
        return {**group, "params": parameters, "lr": group["lr"] * self.lr_ratio if of_b else group["lr"]}
