"""Combines adapters to new ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_lightning.lora.adaptation import attach_to
from lora_lightning.lora.adapter import layers_of
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.layers import adapters_of
from lora_lightning.lora.matching import exactly, literally
from lora_lightning.lora.record import adapted_weights, adapter_names, attachment_of, config_of, unwrapped
from lora_lightning.lora.selection import check
from lora_lightning.lora.targets import AdaptedWeight, Target


def add_weighted_adapter(module: nn.Module, weights: Mapping[str, float], name: str) -> None:
    """Add and activate adapters whose update is exactly the weighted sum of the updates of other adapters.

    Σ w_i s_i B_i A_i equals B A with the concatenated factors, so the ranks add up.

    Args:
        module: A module with adapters of all these names.
        weights: The weights by adapter name.
        name: Name of the new adapters.

    Raises:
        ValueError: If a name does not exist, the new name exists, or an adapter uses DoRA or modules that are trained
            in full.

    Example::

        add_weighted_adapter(net, {"digit9": 0.5, "digit7": 0.5}, name="both")
    """
    module = unwrapped(module)
    names = adapter_names(module)
    if any(other not in names for other in weights) or name in names or not weights:
        raise ValueError(
            f"Cannot combine {list(weights)} as {name!r}: this {type(module).__name__} has adapters named "
            f"{', '.join(names)}. Use some of these, and a new name for the result."
        )
    found: dict[str, list[AdaptedWeight]] = {}
    for other in weights:
        for weight in adapted_weights(module, other):
            if not weight.adapter.is_linear or other in attachment_of(module).saved:
                raise ValueError(
                    f"The adapters {other!r} cannot be added: they use DoRA, or modules or biases that are trained "
                    "in full. Combine others."
                )
            found.setdefault(weight.name if weight.parameter else "bypass of the module", []).append(weight)
    factors = [_sum(terms, weights) for terms in found.values()]
    selected = [
        Target(first.layer_name, first.layer, first.parameter, first.kind, a.shape[-2], first.sizes)
        for (first, *_), (a, _) in zip(found.values(), factors, strict=True)
    ]
    config = _config(module, selected, weights)
    if config.lora_bias:
        check(selected, config)
    attach_to(module, selected, config, name)
    with torch.no_grad():
        for target, (a, b) in zip(selected, factors, strict=True):
            adapter = next(
                weight.adapter
                for weight in adapted_weights(module, name)
                if weight.layer is target.layer and weight.parameter == target.parameter
            )
            adapter.set_factors(a, b)
            if adapter.lora_bias is not None:
                adapter.lora_bias.copy_(_sum_of_biases(target, weights))


def _sum(terms: list[AdaptedWeight], weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """Return the concatenated factors of the weighted updates of one weight."""
    pairs = [(*term.adapter.factors(), weights[term.adapter_name] * term.adapter.scaling) for term in terms]
    return torch.cat([a.detach() for a, _, _ in pairs], dim=-2), torch.cat(
        [b.detach() * s for _, b, s in pairs], dim=-1
    )


def _sum_of_biases(target: Target, weights: Mapping[str, float]) -> Tensor:
    """Return the weighted sum of the biases of the adapters of one weight."""
    adapters = adapters_of(target.layer, target.parameter)
    total = torch.zeros(target.shape[0])
    for name, factor in weights.items():
        if name in adapters.names() and adapters.adapter(name).config.lora_bias:
            update = adapters.adapter(name).own_bias() * (factor * adapters.adapter(name).scaling)
            total = total.to(update) + update
    return total


def _config(module: nn.Module, selected: list[Target], weights: Mapping[str, float]) -> LoRAConfig:
    """Return a configuration that selects exactly these weights, with a scale of 1."""
    layers = [target.name for target in selected if target.parameter and not target.kind.is_reader]
    inside = [target.name for target in selected if target.kind.is_reader]
    bypass = next((config.bypass for name in weights if (config := config_of(module, name)).bypass), None)
    modules = [key for key, _ in layers_of(module)]
    parameters = [f"{name}.{key}".lstrip(".") for name, layer in layers_of(module) for key in layer._parameters]
    ranks = {literally(target.name): target.rank for target in selected}
    return LoRAConfig(
        rank=max(ranks.values()),
        bypass=bypass,
        target_modules=exactly(layers, modules) if layers else [],
        target_parameters=exactly(inside, parameters) if inside else [],
        rank_pattern=ranks,
        lora_bias=any(config_of(module, name).lora_bias for name in weights),
    )
