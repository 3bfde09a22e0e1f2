"""Reads the trained state of an adapted module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_lightning.lora.model import AdaptedWeight, adapted_weights, is_adapted, unwrapped


def adapter_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the trained parameters: those of the adapters and of the modules that are trained in full."""
    module = unwrapped(module)
    saved = saved_keys(module)
    return [value for key, value in module.named_parameters() if is_adapter_key(key) or key in saved]


def adapter_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return the trained state by state-dict key, as detached tensors that share memory with `module`."""
    module = unwrapped(module)
    saved = saved_keys(module)
    return {key: value for key, value in module.state_dict().items() if is_adapter_key(key) or key in saved}


def is_adapter_key(key: str) -> bool:
    """Return whether a state-dict key belongs to an adapter."""
    return key.rpartition(".")[2].startswith("lora_")


def saved_keys(module: nn.Module) -> set[str]:
    """Return the state-dict keys of the modules that are trained in full."""
    found = {name: vars(child).get("_lora_attachment") for name, child in module.named_modules()}
    return {
        f"{name}.{key}".lstrip(".") for name, each in found.items() if each and each.saved for key in each.saved.keys
    }


def is_untrained(module: nn.Module) -> bool:
    """Return whether `module` has adapters and none of them has an effect yet."""
    return is_adapted(module) and all(map(_is_untrained, adapted_weights(module)))


@torch.no_grad()
def _is_untrained(each: AdaptedWeight) -> bool:
    a, b = each.factors
    weight = each.weight if each.weight is not None else torch.empty(len(b), a[0].numel(), device="meta")
    return not each.adapter.lora_delta_weight(weight).any()
