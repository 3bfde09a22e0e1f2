"""Merges adapters into the weights, for a while or permanently."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_lightning.lora.adaptation import leave_plain
from lora_lightning.lora.adapter import is_quantized
from lora_lightning.lora.layers import (
    bias_with_updates,
    is_computed,
    require_own_class,
    stored,
    stored_bias,
    with_updates,
    without_power_iteration,
)
from lora_lightning.lora.modules_to_save import shared_memory
from lora_lightning.lora.packed import become_linear
from lora_lightning.lora.record import adapted_layers, adapted_weights, attachment_of, require_no_context, unwrapped
from lora_lightning.lora.targets import AdaptedWeight
from lora_lightning.wording import some_of


@contextmanager
def merged(module: nn.Module) -> Iterator[None]:
    """Compute with W' = W + ΔW, which is formed once, within this context. The weights themselves do not change.

    Within the context, a forward pass is as fast as that of the base. The context needs memory for a copy of the
    adapted weights. Changes to adapters inside the context have no effect until it ends. `disabled` inside the context
    gives the base.

    Raises:
        ValueError: If another layer shares an adapted weight, or if there is a bypass, which cannot be merged.
    """
    key = object()
    found = [(weight.adapters, _merged_weight(weight), _merged_bias(weight)) for weight in _mergeable(module)]
    try:
        for adapters, weight, bias in found:
            adapters.merge(key, weight, bias)
        yield
    finally:
        for adapters, _, _ in found:
            adapters.unmerge(key)


@torch.no_grad()
def merge(module: nn.Module, check_finite: bool = True) -> None:
    """Merge the active adapters into the weights permanently.

    The result has plain layers with the `requires_grad` from before `attach`.

    The weight in effect is computed in the dtype of the adapter and rounded once to the dtype of the weight. A
    quantized weight is dequantized, with a warning, since quantizing the sum would lose most of an update that is
    smaller than a quantization step.

    Args:
        module: The module that `attach` was called with.
        check_finite: Whether to refuse adapters that bring NaN or infinity into the weights.

    Raises:
        ValueError: If `module` is not adapted, another layer shares an adapted weight, a weight is computed from
            others, a merged weight would not be finite, or there is a bypass. `module` is then unchanged.
        RuntimeError: Within `bare`, `disabled` or `merged`, or if the class of a layer was replaced after `attach`.
    """
    module = unwrapped(module)
    attachment_of(module)
    require_no_context(module, "merge")
    for layer in adapted_layers(module):
        require_own_class(layer)
    found = _mergeable(module)
    for weight in found:
        _require_place(weight)
    weights, biases = [_merged_weight(weight) for weight in found], [_merged_bias(weight) for weight in found]
    new = list(zip(found, weights, biases, strict=True))
    if check_finite:
        bad = [weight.name for weight, merged, bias in new if not _is_finite(weight, merged, bias)]
        if bad:
            raise ValueError(
                f"The adapters of {some_of(map(repr, bad))} contain NaN or infinity, or their sum with the base is too "
                "large for its dtype: merging would destroy the base."
            )
    quantized = [weight.name for weight in found if weight.kind.is_packed or is_quantized(_stored(weight))]
    if quantized:
        warnings.warn(
            f"The weights of {some_of(quantized)} were quantized and are dense after merging. "
            "Quantize the merged model again if necessary.",
            stacklevel=2,
        )
    leave_plain(module)
    for weight, merged, bias in new:
        _write(weight, merged, bias)


def _write(weight: AdaptedWeight, merged: Tensor, bias: Tensor | None) -> None:
    """Write W' and the bias, if adapters add to it, into a layer that is plain again."""
    if weight.kind.is_packed:
        become_linear(weight.layer, merged)
    elif is_quantized(_stored(weight)):
        weight.layer._parameters[weight.parameter] = nn.Parameter(merged, requires_grad=False)
    else:
        _stored(weight).data.copy_(merged)
    own = stored_bias(weight.layer)
    if bias is not None and own is not None:
        own.data.copy_(bias)


def _stored(weight: AdaptedWeight) -> Tensor:
    return stored(weight.layer, weight.parameter)


def _mergeable(module: nn.Module) -> list[AdaptedWeight]:
    """Return each adapted weight once, or raise a `ValueError` if they cannot be merged."""
    module = unwrapped(module)
    attachment_of(module)
    found, memory = adapted_weights(module), shared_memory(module)
    for weight in found:
        if not weight.parameter:
            raise ValueError(
                f"The bypass around this {type(module).__name__} does not belong to any weight and cannot be merged. "
                "Keep it unmerged."
            )
        names = memory.get(id(weight.weight), [])
        if len(names) > 1:
            raise ValueError(
                f"The weight of {weight.name!r} is shared ({', '.join(names)}): merging would change the other layer "
                "too. Keep the adapters unmerged, or leave the shared layer out of target_modules."
            )
    return list({(weight.layer, weight.parameter): weight for weight in found}.values())


def _require_place(weight: AdaptedWeight) -> None:
    """Check that a layer has a weight, and a bias if adapters add to it, that a merged value can be written into.

    Raises:
        ValueError: If it has not.
    """
    if is_computed(weight.layer, weight.parameter):
        raise ValueError(
            f"The weight of {weight.name!r} is computed from other parameters (pruned, normed or parametrized), so "
            "there is nothing to merge into. Make it permanent first, or keep the adapters unmerged."
        )
    if _active_bias(weight) and stored_bias(weight.layer) is None:
        raise ValueError(
            f"The adapter of {weight.name!r} has a bias (lora_bias=True), and the layer has none to merge it into. "
            "Keep the adapters unmerged."
        )


@torch.no_grad()
def _merged_weight(weight: AdaptedWeight) -> Tensor:
    merged = weight.adapters.in_effect.merged
    if merged is not None:
        return merged
    chosen = tuple(map(weight.adapters.adapter, weight.adapters.active))
    with without_power_iteration(weight.layer):
        return with_updates(weight.layer, weight.adapters, chosen)


@torch.no_grad()
def _merged_bias(weight: AdaptedWeight) -> Tensor | None:
    """Return b + Σ s c, or `None` if no active adapter has a bias."""
    if not _active_bias(weight):
        return None
    in_effect = weight.adapters.in_effect
    if in_effect.merged is not None:
        return in_effect.bias
    return bias_with_updates(weight.layer, tuple(map(weight.adapters.adapter, weight.adapters.active)))


def _active_bias(weight: AdaptedWeight) -> bool:
    """Return whether any of the active adapters has a bias."""
    return any(weight.adapters.adapter(name).config.lora_bias for name in weight.adapters.active)


def _is_finite(weight: AdaptedWeight, merged: Tensor, bias: Tensor | None) -> bool:
    """Return whether W' and its bias are finite where W and b are. The rest is not the fault of the adapters."""
    if merged.isfinite().all() and (bias is None or bias.isfinite().all()):
        return True
    pairs = [(merged, weight.dense_weight()), (bias, stored_bias(weight.layer))]
    return all(
        bool((after.isfinite() | ~before.isfinite()).all())
        for after, before in pairs
        if after is not None and before is not None
    )
