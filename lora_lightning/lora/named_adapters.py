"""Keeps several adapters for one base, of which one is active."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.config import LoRAConfig, Names
from lora_lightning.lora.freeze import freeze
from lora_lightning.lora.layers import compose
from lora_lightning.lora.model import (
    EXTENSIONS,
    AdaptedWeight,
    Attachment,
    adapt,
    adapted_weights,
    attachment_of,
    candidates,
    is_adapted,
    remove_adapters,
    select,
    unwrapped,
)

Removed = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


@dataclass
class SetAside:
    """Holds inactive adapters."""

    config: LoRAConfig
    removed: Removed
    saved: Any


def adapter_names(module: nn.Module) -> list[str]:
    """Return the names of all adapters. The first one is active."""
    attachment = attachment_of(module)
    return [attachment.name, *attachment.others]


def set_adapter(module: nn.Module, name: str) -> None:
    """Activate the adapters with this name. The adapters that were active become inactive and keep their values.

    Inactive adapters only cost memory. They are not in `state_dict` or `parameters`. An optimizer that has their parameters
    keeps them.

    Raises:
        ValueError: If there are no adapters with this name.
    """
    module = unwrapped(module)
    names = adapter_names(module)
    if name not in names:
        raise ValueError(f"This {type(module).__name__} has no adapters named {name!r}; it has {', '.join(names)}.")
    if name != names[0]:
        _use(module, name, set_aside(module))


def add_weighted_adapter(module: nn.Module, weights: Mapping[str, float], name: str) -> None:
    """Add and activate adapters whose update is exactly the weighted sum of the updates of other adapters.

    Σ w_i s_i B_i A_i equals B A with the concatenated factors, so the ranks add up.

    Args:
        module: A module with adapters of all these names.
        weights: The weights by adapter name.
        name: Name of the new adapters.

    Raises:
        ValueError: If a name does not exist, the new name exists, or an adapter uses DoRA or modules that are trained in full.

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
    terms: dict[str, list[tuple[Tensor, Tensor]]] = {}
    inside: list[str] = []
    bypass: tuple[int, int] | None = None
    try:
        for other, weight in weights.items():
            set_adapter(module, other)
            config = attachment_of(module).config
            if config.use_dora or config.modules_to_save:
                raise ValueError(
                    f"The adapters {other!r} cannot be added: they use DoRA, or modules that are trained "
                    "in full. Combine others."
                )
            bypass = config.bypass or bypass
            for each in adapted_weights(module):
                a, b = (factor.detach() for factor in each.adapter.lora_factors())
                terms.setdefault(each.name, []).append((a, b * (weight * each.adapter.lora_scaling)))
                inside += [each.name] if each.kind.lora_is_inside else []
    finally:
        set_adapter(module, names[0])
    ranks = {re.escape(key) or "(?:)": sum(len(a) for a, _ in factors) for key, factors in terms.items()}
    with bare(module):
        layers = [key for key in terms if key not in inside and (key or not bypass)]
        parameters = [key for key, _ in module.named_parameters(remove_duplicate=False)]
        config = LoRAConfig(
            rank=max(ranks.values()),
            target_modules=exactly(layers, [key for key, _ in module.named_modules()]) if layers else [],
            rank_pattern=ranks,
            target_parameters=exactly(inside, parameters) if inside else [],
            bypass=bypass,
        )
        known = candidates(module, config)
        selected = [known[key] for key in terms if key in known] + (
            EXTENSIONS["bypass"](module, config) if bypass else []
        )
    add_selected(module, config, selected, name)
    with torch.no_grad():
        for each in adapted_weights(module):
            a, b = each.adapter.lora_factors()
            a.copy_(torch.cat([factor for factor, _ in terms[each.name]]))
            b.copy_(torch.cat([factor for _, factor in terms[each.name]], dim=1))


def add_adapter(module: nn.Module, config: LoRAConfig, name: str) -> list[str]:
    """Attach adapters to a module with other adapters, which become inactive."""
    if name in adapter_names(module):
        raise ValueError(
            f"This {type(module).__name__} already has adapters on {[each.name for each in adapted_weights(module)]}. "
            "Call detach(module) or merge(module) first, or give the new adapters another name."
        )
    with bare(module):
        selected = select(module, config)
    return add_selected(module, config, selected, name)


def add_selected(module: nn.Module, config: LoRAConfig, selected: list[AdaptedWeight], name: str) -> list[str]:
    """Adapt weights that have been selected. Existing adapters of the module become inactive."""
    if not is_adapted(module):
        trainable = frozenset(key for key, value in module.named_parameters() if value.requires_grad)
        return adapt(module, selected, Attachment(config, name, trainable))
    before = attachment_of(module)
    others = set_aside(module)
    try:
        return adapt(module, selected, Attachment(config, name, before.was_trainable, others=others))
    except BaseException:
        module._lora_attachment = before  # type: ignore[assignment] # `adapt` has removed its own
        _use(module, before.name, others)
        raise


def set_aside(module: nn.Module) -> dict[str, SetAside]:
    """Remove the active adapters and return all adapters by name."""
    attachment = attachment_of(module)
    if attachment.saved:
        attachment.saved.lora_active = False
    return {
        **attachment.others,
        attachment.name: SetAside(attachment.config, remove_adapters(module), attachment.saved),
    }


def _use(module: nn.Module, name: str, others: dict[str, SetAside]) -> None:
    """Activate the adapters with this name on a module without active adapters."""
    others = dict(others)
    wanted = others.pop(name)
    trainable = attachment_of(module).was_trainable
    module._lora_attachment = Attachment(wanted.config, name, trainable, wanted.saved, others)  # type: ignore[assignment]
    if wanted.saved:
        wanted.saved.lora_active = True
    freeze(module, wanted.saved.modules if wanted.saved else ())
    restore_adapters(module, wanted.removed)


def restore_adapters(module: nn.Module, removed: Iterable[tuple[str, tuple[Any, ...], dict[str, Any]]]) -> None:
    """Undo `remove_adapters`. The adapters are moved to the current device of the module."""
    modules, device = dict(module.named_modules()), next(module.parameters(), torch.zeros(())).device
    for name, mixins, held in removed:
        layer = modules[name]
        compose(layer, *mixins)
        for key, value in held.items():
            if isinstance(value, nn.Parameter):
                value.data = value.data.to(device)
                layer.register_parameter(key, value)
            elif isinstance(value, nn.Module):
                layer.add_module(key, value.to(device))
            elif isinstance(value, Tensor):
                layer.register_buffer(key, value.to(device))
            else:
                setattr(layer, key, value)


@contextmanager
def bare(module: nn.Module) -> Iterator[None]:
    """Remove the adapters within this context to inspect the plain layers."""
    removed = remove_adapters(module)
    try:
        yield
    finally:
        restore_adapters(module, removed)


def exactly(names: Iterable[str], among: Iterable[str]) -> str | list[str]:
    """Return patterns that match exactly these names `among` all names: a list if possible, else an expression."""
    names = list(names)
    selected, is_named = set(names), Names(names)
    if all(name in selected for name in among if is_named(name)):
        return names
    # A module that is itself the adapted layer has the empty name; "(?:)" matches that and nothing else.
    return "|".join(re.escape(name) for name in names) or "(?:)"


EXTENSIONS["name"] = add_adapter
