"""Returns the merged weights of an adapted module, which itself stays adapted."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_lightning.lora.adapter import is_distributed, is_quantized
from lora_lightning.lora.layers import bias_in_effect, effective, is_computed, stored, stored_bias
from lora_lightning.lora.modules_to_save import shared_memory
from lora_lightning.lora.record import adapted_weights, unwrapped
from lora_lightning.lora.state import with_values
from lora_lightning.lora.targets import AdaptedWeight
from lora_lightning.wording import some_of


def require_mergeable(module: nn.Module) -> None:
    """Check that a plain state dict can hold the weights of `module` with its adapters.

    Raises:
        ValueError: If a weight is tied, computed, quantized or distributed, if an adapter has a bias and its layer has
            none, or if there is a bypass. The message names it.
    """
    memory = shared_memory(unwrapped(module))
    refused = [
        f"{weight.name or 'the bypass'!r} ({why})"
        for weight in adapted_weights(module)
        if (why := _why_not(weight, memory))
    ]
    if refused:
        raise ValueError(
            f"The weights of {some_of(refused)} cannot be merged into a plain checkpoint. Leave these layers out with "
            "exclude_modules, or keep checkpoints of adapters."
        )


@torch.no_grad()
def merged_weights(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights and biases with the active adapters by state-dict key, for these values of the adapters."""
    with with_values(module, values):
        found = {weight.key: effective(weight.layer, weight.adapters) for weight in adapted_weights(module)}
        biases = {key: bias_in_effect(weight.layer, weight.adapters) for key, weight in _with_biases(module)}
    return found | {key: bias for key, bias in biases.items() if bias is not None}


def base_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the adapted weights, and biases that adapters add to, without adapters by state-dict key."""
    found = {weight.key: stored(weight.layer, weight.parameter).detach() for weight in adapted_weights(module)}
    biases = {key: stored_bias(weight.layer) for key, weight in _with_biases(module)}
    return found | {key: bias.detach() for key, bias in biases.items() if bias is not None}


def _with_biases(module: nn.Module) -> list[tuple[str, AdaptedWeight]]:
    """Return the weights whose active adapters have a bias, by the key of the bias of the layer."""
    return [
        (f"{weight.layer_name}.bias".lstrip("."), weight)
        for weight in adapted_weights(module)
        if weight.adapter.config.lora_bias
    ]


def _why_not(weight: AdaptedWeight, memory: Mapping[int, list[str]]) -> str:
    if not weight.parameter:
        return "a path around the module"
    tensor = stored(weight.layer, weight.parameter)
    names = memory.get(id(tensor), [])
    if len(names) > 1:
        return f"shared by {', '.join(names)}"
    if is_computed(weight.layer, weight.parameter):
        return "computed from other parameters"
    if weight.adapter.config.lora_bias and stored_bias(weight.layer) is None:
        return "without a bias for that of its adapter"
    if weight.kind.is_packed or is_quantized(tensor):
        return "quantized"
    return "distributed over processes" if is_distributed(tensor) else ""
