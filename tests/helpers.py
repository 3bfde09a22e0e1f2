"""What several tests do with modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora import adapter_parameters


def stir(module: nn.Module, by: float = 0.1) -> None:
    """Move every parameter that trains, so that adapters do something."""
    with torch.no_grad():
        for parameter in adapter_parameters(module):
            parameter += by * torch.randn_like(parameter)


def state(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state dict."""
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(first: Any, second: Any) -> bool:
    """Return whether two nested structures of tensors and values are equal, bit for bit."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second) or str(first) == str(second) == "nan"
