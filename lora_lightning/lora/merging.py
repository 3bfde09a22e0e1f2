"""Disables adapters temporarily, and merges them into the weights of the base, temporarily or permanently."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_lightning.lora.bitsandbytes_layers import become_linear
from lora_lightning.lora.model import AdaptedWeight, adapted_weights, attachment_of, leave_plain, unwrapped
from lora_lightning.wording import some_of


@contextmanager
def disabled(module: nn.Module) -> Iterator[None]:
    """Disable the adapters within this context. A module without adapters is not changed."""
    found = [vars(child).get("_lora_attachment") for child in unwrapped(module).modules()]
    saved = [attachment.saved for attachment in found if attachment]
    switched = [*filter(None, saved), *(each.adapter for each in adapted_weights(module))]
    before = [each.lora_active for each in switched]
    try:
        for each in switched:
            each.lora_active = False
        yield
    finally:
        for each, active in zip(switched, before, strict=True):
            each.lora_active = active


@contextmanager
def merged(module: nn.Module) -> Iterator[None]:
    """Merge the adapters into the weights within this context. Afterwards the weights are restored bitwise.

    Within the context, a forward pass is as fast as that of the base. The context needs memory for a copy of the adapted weights.
    Changes to parameters inside the context are lost.

    Raises:
        ValueError: If another layer shares an adapted weight, or if there is a bypass, which cannot be merged.
    """
    folded = [each for each in _foldable(module) if each.adapter.lora_active]
    before = [each.weight for each in folded]
    try:
        for each in folded:
            each.layer._parameters[each.parameter] = nn.Parameter(_effective(each), requires_grad=False)
            each.adapter.lora_active = False
        yield
    finally:
        for each, weight in zip(folded, before, strict=True):
            each.layer._parameters[each.parameter] = weight
            each.adapter.lora_active = True


def merge(module: nn.Module) -> None:
    """Merge the adapters into the weights permanently. The result has plain layers with the `requires_grad` from before `attach`.

    The effective weight is computed in the dtype of the adapter and rounded once to the dtype of the weight. A quantized weight
    is dequantized, with a warning, since quantizing the sum would lose most of an update that is smaller than a quantization step.

    Raises:
        ValueError: If `module` is not adapted, if another layer shares an adapted weight, or if there is a bypass.
    """
    found = _foldable(module)
    dense: dict[nn.Module, Tensor] = {}
    if quantized := [each.name for each in found if each.kind.lora_is_packed or is_quantized(each.weight)]:
        warnings.warn(
            f"The weights of {some_of(quantized)} were quantized and are dense after merging. Quantize the merged model again if necessary.",
            stacklevel=2,
        )
    for each in found:
        if each.kind.lora_is_packed:
            dense[each.layer] = _effective(each)
        elif is_quantized(each.weight):
            each.layer._parameters[each.parameter] = nn.Parameter(_effective(each), requires_grad=False)
        else:
            each.weight.data.copy_(_effective(each))
    leave_plain(unwrapped(module))
    for layer, weight in dense.items():
        become_linear(layer, weight)


def is_quantized(weight: Tensor) -> bool:
    """Return whether `weight` is one of torchao's quantized tensors."""
    return type(weight).__module__.startswith("torchao.")


def shared_memory(module: nn.Module) -> dict[int, list[str]]:
    """Return the names of all parameters that share memory with a parameter, including its own, by the `id` of the parameter."""
    places: dict[object, list[tuple[str, Tensor, int, int]]] = defaultdict(list)
    for owner_name, owner in module.named_modules():
        for key, value in owner._parameters.items():
            if value is not None:
                places[_storage(value)].append((f"{owner_name}.{key}".lstrip("."), value, *_extent(value)))
    return {
        id(value): [name for name, other, start, stop in each if other is value or (begin < stop and start < end)]
        for each in places.values()
        for _, value, begin, end in each
    }


@torch.no_grad()
def _effective(each: AdaptedWeight) -> Tensor:
    weight: Tensor = each.adapter.lora_effective_weight(each.weight)
    return weight


def _foldable(module: nn.Module) -> list[AdaptedWeight]:
    module = unwrapped(module)
    attachment_of(module)
    found, memory = adapted_weights(module), shared_memory(module)
    for each in found:
        if each.weight is None:
            raise ValueError(
                f"The bypass around this {type(module).__name__} does not belong to any weight and cannot be merged. Keep it "
                "unmerged."
            )
        if len(names := memory[id(each.weight)]) > 1:
            raise ValueError(
                f"The weight of {each.name!r} is shared ({', '.join(names)}): merging would change the other layer too. "
                "Keep the adapters unmerged, or leave the shared layer out of target_modules."
            )
    return found


def _storage(value: Tensor) -> object:
    try:
        return value.untyped_storage().data_ptr() or id(value)
    except (NotImplementedError, RuntimeError, AttributeError):  # a tensor that wraps others, or has no memory
        return id(value)


def _extent(value: Tensor) -> tuple[int, int]:
    """Return the start and end of a tensor in its storage, in bytes."""
    if not value.numel():
        return 0, 0
    begin, steps = int(value.storage_offset()), zip(value.shape, value.stride(), strict=True)
    end = begin + sum((size - 1) * int(stride) for size, stride in steps) + 1
    return begin * value.element_size(), end * value.element_size()
