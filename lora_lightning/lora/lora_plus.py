"""LoRA+: a higher learning rate for B than for A (https://arxiv.org/abs/2402.12354)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_lightning.lora.attached import sites

LR_RATIO = "lr_ratio"
"""Entry of a parameter group of B's: its learning rate over that of the group before it."""


@contextmanager
def lora_plus(module: nn.Module, lr_ratio: float) -> Iterator[None]:
    """Within this context, optimizers that are made give the B of every adapter `lr_ratio` times the learning rate.

    Each of their parameter groups that holds B's is followed by one for these alone, with the same options. Before every
    step the ratio is made good, so that it survives any scheduler, whatever that does to the groups' learning rates, and
    loading the optimizer's state.

    Args:
        module: A module with adapters.
        lr_ratio: λ = η_B / η_A, at least 1; the paper (section 4) recommends about 16.

    Raises:
        ValueError: If the ratio is out of range.

    Example::

        with lora_plus(net, 16):
            optimizer = torch.optim.AdamW(adapter_parameters(net), lr=1e-4)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-4, total_steps=100)
    """
    check_lr_ratio(lr_ratio)
    ups = {id(site.update.get_parameter(site.update.lora_name_B)) for site in sites(module)}
    add_group = torch.optim.Optimizer.add_param_group

    def add_groups(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
        parameters = group["params"]
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        named = isinstance(parameters[0], tuple) if parameters else False
        of_b = [entry for entry in parameters if id(entry[1] if named else entry) in ups]
        rest = [entry for entry in parameters if id(entry[1] if named else entry) not in ups]
        if not of_b:
            add_group(optimizer, {**group, "params": parameters})
            return
        if not any(LR_RATIO in other for other in optimizer.param_groups):
            optimizer.register_step_pre_hook(keep_ratio)
        add_group(optimizer, {**group, "params": rest})
        add_group(optimizer, {**group, "params": of_b, LR_RATIO: lr_ratio})
        keep_ratio(optimizer)

    torch.optim.Optimizer.add_param_group = add_groups  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.optim.Optimizer.add_param_group = add_group  # type: ignore[method-assign]


def check_lr_ratio(lr_ratio: float) -> float:
    """The ratio itself, if it is one.

    Raises:
        ValueError: If it is not at least 1, or not finite.
    """
    if not 1 <= lr_ratio < float("inf"):
        raise ValueError(f"lr_ratio={lr_ratio!r}: expected B's learning rate over A's, at least 1, for example 16.")
    return lr_ratio


def keep_ratio(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Sets the learning rate of every group of B's from that of the group before it."""
    for before, group in zip(optimizer.param_groups, optimizer.param_groups[1:], strict=False):
        if LR_RATIO in group:
            group["lr"] = before["lr"] * group[LR_RATIO]
