"""LoRA+: a higher learning rate for B than for A (https://arxiv.org/abs/2402.12354)."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_lightning.lora.record import adapted_weights
from lora_lightning.lora.state import adapter_parameters


def lora_plus_param_groups(module: nn.Module, lr: float, lr_ratio: float) -> list[dict[str, Any]]:
    """Return two parameter groups: B of every adapter at `lr * lr_ratio`, and all other trained parameters at `lr`.

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
    """Return the B of every trained adapter, by identity."""
    trained = [
        weight for weight in adapted_weights(module) if weight.is_trained and "lora_B" not in weight.adapter.fixed
    ]
    return {id(weight.factors[1]): weight.factors[1] for weight in trained}
