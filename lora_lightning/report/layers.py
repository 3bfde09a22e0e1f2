"""Measures the change of each adapted layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora import AdaptedWeight, adapted_weights


@torch.no_grad()
def layer_changes(module: nn.Module, with_base: bool = True) -> list[dict[str, Any]]:
    """Return the size of each update ΔW = s B A without computing the product.

    Args:
        module: Any module.
        with_base: Whether to measure W as well, which reads the complete base.

    Returns:
        For each active adapter of a weight, its `name`, `rank` and `parameters`, the Frobenius norms of ΔW and of W
        (`base_norm`, which is `None` for a bypass or without `with_base`), and the effective rank of ΔW, averaged over
        experts. The effective rank is the exponential of the entropy of the normalized singular values (Roy and
        Vetterli 2007, https://www.eurasip.org/Proceedings/Eusipco/Eusipco2007/Papers/a5p-h05.pdf). Empty if adapters
        are distributed over devices.
    """
    found = adapted_weights(module)
    if any(hasattr(factor, "device_mesh") for weight in found for factor in weight.factors):
        return []
    return [_change(weight, with_base) for weight in found]


def _change(adapted: AdaptedWeight, with_base: bool) -> dict[str, Any]:
    values = [_singular_values(a, b) * adapted.adapter.scaling for a, b in _matrices(adapted)]
    measured = with_base and bool(adapted.parameter)
    return {
        "name": adapted.title,
        "rank": adapted.rank,
        "parameters": sum(value.numel() for value in adapted.adapter.parameters()),
        "norm": float(torch.cat(values).norm()),
        "base_norm": float(adapted.dense_weight().float().norm()) if measured else None,
        "effective_rank": sum(map(_effective_rank, values)) / len(values),
    }


def _matrices(adapted: AdaptedWeight) -> list[tuple[Tensor, Tensor]]:
    a, b = (factor.cpu().double() for factor in adapted.adapter.factors())
    return list(zip(a, b, strict=True)) if adapted.layout.experts else [(a, b)]


def _singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Return the singular values of B A from the triangular factors of B and A."""
    values: Tensor = torch.linalg.svdvals(torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T)
    return values


def _effective_rank(values: Tensor) -> float:
    if not values.sum():
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())
