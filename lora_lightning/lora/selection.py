"""Finds the weights that a configuration selects."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from lora_lightning.lora.adapter import Adapter, Adapters, layers_of
from lora_lightning.lora.bypass import bypass_target
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.layers import Adapted, child_name, stored
from lora_lightning.lora.matching import Names
from lora_lightning.lora.registry import BY_NAME, KINDS_OF_OTHERS, kind_of
from lora_lightning.lora.targets import Target
from lora_lightning.lora.variants import adapter_class
from lora_lightning.wording import some_of

_log = logging.getLogger("lora_lightning.lora")
_TAKEN = frozenset(dir(Adapters(BY_NAME, "")))
"""Names of attributes, which cannot be those of adapters."""


def candidates(module: nn.Module, config: LoRAConfig) -> dict[str, Target]:
    """Return the weights that can be adapted by name: those of supported layers and those of `target_parameters`."""
    found: dict[str, Target] = {}
    by_name = Names(config.target_parameters)
    for layer_name, layer in layers_of(module):
        if isinstance(layer, torch.jit.ScriptModule):  # its class cannot be replaced
            continue
        kind = kind_of(layer)
        wanted = [key for key in _weights_of(layer) if by_name.match(f"{layer_name}.{key}".lstrip("."))]
        own = [] if wanted and not kind.is_reader else kind.parameters(layer)
        for key in dict.fromkeys((*own, *wanted)):
            target = Target(layer_name, layer, key, kind if key in own else BY_NAME)
            found[target.name] = replace(target, rank=config.rank_of(*target.names))
    return found


def select(module: nn.Module, config: LoRAConfig) -> list[Target]:
    """Return the weights that `config` selects, with their ranks.

    Raises:
        ValueError: If a pattern matches nothing, or a weight cannot be adapted. The message names all of these.
    """
    known = candidates(module, config)
    modules = {name: child for name, child in module.named_modules() if name}
    by_name, saved = Names(config.target_parameters), Names(config.modules_to_save)
    in_full = {layer for name, child in modules.items() if saved.match(name) for layer in child.modules()}
    left_out = _left_out_of_all(module, known, config) if config.target_modules == "all" else set()
    wanted = [target for target in known.values() if config.selects(*target.names) or by_name.match(target.name)]
    selected = [target for target in wanted if target.layer not in in_full and target.name not in left_out]
    if config.bypass:
        selected.append(bypass_target(module, config))
    missing = _unmatched_targets(config, known)
    if missing:
        raise ValueError(_nothing_matches(missing, known))
    _check_patterns(config, selected, modules)
    if not selected:
        raise ValueError(_nothing_matches([], known))
    check(selected, config)
    if config.target_modules == "all":
        _say_what_is_not_reached(module, selected, in_full)
    if config.qkv and not all(is_qkv(target, config) for target in selected):
        _log.warning(
            "qkv=%r applies to %s. The other targets, without %s, are adapted as usual.",
            config.qkv,
            some_of(target.name for target in selected if is_qkv(target, config)),
            f"{sum(config.qkv_sizes)} outputs" if config.qkv_sizes else "three times as many outputs as inputs",
        )
    return limit_ranks(selected)


def check(selected: Iterable[Target], config: LoRAConfig) -> None:
    """Check that these weights can be adapted.

    Raises:
        ValueError: If one cannot. The message names all of these.
    """
    selected = list(selected)
    if config.qkv and selected and not any(is_qkv(target, config) for target in selected):
        raise ValueError(_no_qkv(selected[0], config))
    refused = [f"Layer {target.name!r} {why}" for target in selected if (why := _refusal(target, config))]
    if refused:
        raise ValueError(f"{some_of(refused)}. Leave such layers out with exclude_modules, or do not name them.")


def can_be_name(name: str) -> bool:
    """Return whether adapters can have this name, which is that of a module."""
    return bool(name) and "." not in name and name not in _TAKEN


def check_name(selected: Iterable[Target], name: str) -> None:
    """Check that adapters with this name can be added.

    Raises:
        ValueError: If the name cannot be that of a module, or a layer has an attribute with the name of its adapters.
    """
    if not can_be_name(name):
        raise ValueError(
            f"{name!r} cannot be the name of adapters, since these are modules with this name: use letters, digits and "
            "underscores, for example 'digit_9'."
        )
    for target in selected:
        child = child_name(target.parameter)
        own = isinstance(target.layer, Adapted) and target.parameter in dict(target.layer.lora_kinds)
        if not own and hasattr(target.layer, child):
            raise ValueError(
                f"Layer {target.name!r} has an attribute {child!r} of its own, which is the name of the adapters. "
                "Rename it, or leave this layer out with exclude_modules."
            )


def bias_keys(module: nn.Module, selected: Iterable[Target], config: LoRAConfig) -> list[str]:
    """Return the state-dict keys of the biases that `config` trains in full: parameters named `bias`, as in PEFT."""
    adapted = {target.layer for target in selected if target.parameter}
    return [
        f"{name}.bias".lstrip(".")
        for name, layer in layers_of(module)
        if config.bias == "all" or (config.bias == "lora_only" and layer in adapted)
        if (bias := layer._parameters.get("bias")) is not None and bias.is_floating_point()
    ]


def variant_of(target: Target, config: LoRAConfig) -> type[Adapter]:
    """Return the class of the adapter for a weight. A bypass has plain ones."""
    return adapter_class(config, is_qkv(target, config)) if target.parameter else Adapter


def is_qkv(target: Target, config: LoRAConfig) -> bool:
    """Return whether the outputs of a layer may be query, key and value.

    There are as many of them as `qkv_sizes` says, or three times as many as inputs.
    The gates of a GRU are also three, and an embedding may have any sizes.
    """
    weight = target.weight
    if weight is None or is_lazy(weight) or target.layout.experts:
        return False
    if isinstance(target.layer, nn.RNNBase | nn.RNNCellBase | nn.Embedding) or target.outline().dim() < 2:
        return False
    rows, columns = target.shape
    return rows == (sum(config.qkv_sizes) if config.qkv_sizes else 3 * columns)


def _no_qkv(target: Target, config: LoRAConfig) -> str:
    """Return the error message for targets none of which has outputs for query, key and value."""
    rows, columns = target.shape
    if config.qkv_sizes:
        total = f"{' + '.join(map(str, config.qkv_sizes))} = {sum(config.qkv_sizes)}"
        return (
            f"Layer {target.name!r} has {rows} outputs: expected {total} for qkv_sizes={config.qkv_sizes}, in at least "
            "one of the targets."
        )
    return (
        f"Layer {target.name!r} has {rows} outputs and {columns} inputs: expected three times as many outputs as "
        f"inputs for qkv={config.qkv!r}, in at least one of the targets. Set qkv_sizes if key and value are smaller "
        "than the query."
    )


def _may_interleave(target: Target, config: LoRAConfig) -> bool:
    """Return whether a layer has the name of those that interleave query, key and value by head."""
    return any("query_key_value" in name for name in (target.name, config.target_modules, *config.target_modules))


def limit_ranks(selected: list[Target]) -> list[Target]:
    """Return the weights with ranks that are not larger than the weights. A log line names those that were lowered."""
    lowered = [target for target in selected if target.rank > min(target.shape)]
    if lowered:
        listed = some_of(
            f"{target.name or 'root'!r} has {min(target.shape)} instead of {target.rank}" for target in lowered
        )
        _log.warning("Ranks are limited by the size of the layers: %s.", listed)
    return [replace(target, rank=min(target.rank, *target.shape)) for target in selected]


def _weights_of(layer: nn.Module) -> list[str]:
    """Return the names of the parameters of a layer, and of the tensors that are computed from them."""
    names = [name for name, _ in layer.named_parameters(recurse=False)]
    computed = [name.removesuffix("_orig") for name in names if name.endswith("_orig")]
    parametrized = list(getattr(layer, "parametrizations", ()))
    own = [name for name in names if not name.endswith("_orig")]
    return [*own, *computed, *parametrized]


def _refusal(target: Target, config: LoRAConfig) -> str | None:
    if not target.parameter:
        return target.kind.refusal(target.layer, "", target.outline(), config)
    known = dict(target.layer.lora_kinds).get(target.parameter) if isinstance(target.layer, Adapted) else None
    if known is not None and type(known) is not type(target.kind):  # all adapters of a weight have one layout
        before, now = ("target_parameters", "a layer") if known.is_reader else ("target_modules", "a parameter")
        return f"has adapters from {before} already and cannot be adapted as {now} as well: use {before} again"
    weight = stored(target.layer, target.parameter)
    if is_lazy(weight):
        return "has no weight yet: run a batch through the model first"
    if weight.is_meta and hasattr(target.layer, "_hf_hook"):
        return "is offloaded: its weight is only on a device while it computes. Load the model without offloading"
    if not target.kind.is_packed and not _can_hold_an_update(target, weight):
        return f"has a weight of {weight.dtype}: expected float16 or above, or one quantized by torchao or bitsandbytes"
    if weight.dim() < 2:
        return (
            f"is of shape {tuple(weight.shape)}: expected two or more dimensions. Train such a module in full, "
            "with modules_to_save"
        )
    if config.qkv and is_qkv(target, config) and _may_interleave(target, config):
        return f"may interleave query, key and value by head, but qkv={config.qkv!r} expects three blocks"
    variant = variant_of(target, config)
    values = target.dense_weight() if variant.reads_weight and not target.layout.experts else target.outline()
    why = variant.refusal(values, target.layout, config)
    return why or target.kind.refusal(target.layer, target.parameter, weight, config)


def _can_hold_an_update(target: Target, weight: Tensor) -> bool:
    plain = target.kind.dense(target.layer, weight) if weight.is_floating_point() else weight
    return plain.is_floating_point() and plain.itemsize >= 2


def _unmatched_targets(config: LoRAConfig, known: dict[str, Target]) -> list[str]:
    """Return the targets of a configuration that match nothing."""
    targets = [] if config.target_modules == "all" else config.target_modules
    missing = Names(targets).unmatched(name for target in known.values() for name in target.names)
    return missing + Names(config.target_parameters).unmatched(known)


def _check_patterns(config: LoRAConfig, selected: list[Target], modules: dict[str, nn.Module]) -> None:
    """Check that the other patterns of a configuration match something.

    Raises:
        ValueError: If one does not. The message names the option and close names.
    """
    names = [name for target in selected for name in target.names]
    options: dict[str, tuple[str | list[str] | dict[str, int] | dict[str, float], str, list[str]]] = {
        "modules_to_save": (config.modules_to_save, "no module", list(modules)),
        "rank_pattern": (config.rank_pattern, "no adapted layer", names),
        "alpha_pattern": (config.alpha_pattern, "no adapted layer", names),
    }
    for option, (patterns, what, among) in options.items():
        missing = Names(patterns).unmatched(among)
        if missing:
            close = [name for key in missing for name in difflib.get_close_matches(key, among)]
            listed = some_of(dict.fromkeys([*close, *among]), 20) or "none"
            raise ValueError(f"{option}: {missing} match {what}. There are: {listed}.")


def _nothing_matches(missing: list[str], known: dict[str, Target]) -> str:
    close = [name for key in missing for name in difflib.get_close_matches(key, known)]
    what = f"Targets {missing} match no layer of a supported kind" if missing else "No layer is left to adapt"
    listed = some_of(dict.fromkeys([*close, *known] if len(known) > 20 else known), 20) or "none"
    return f"{what}. Layers that can be adapted: {listed}. For others, set target_parameters."


def _left_out_of_all(module: nn.Module, known: dict[str, Target], config: LoRAConfig) -> set[str]:
    """Return the weights that `target_modules="all"` excludes in models of the transformers library.

    What is left are those of PEFT's `all-linear`. The excluded ones are the non-linear layers and the output head. A
    log line names them.
    """
    inside: set[nn.Module] = set()
    heads: set[nn.Module] = set()
    for host in module.modules():
        if any(cls.__module__.startswith("transformers.") for cls in type(host).__mro__):
            head = getattr(host, "get_output_embeddings", None)
            if head is not None:
                inside |= set(host.modules())
                heads |= {head()} - {None}
    by_name = Names(config.target_parameters)
    left_out = [
        name
        for name, target in known.items()
        if target.layer in inside
        and (target.layer in heads or not _is_linear(target))
        and config.selects(*target.names)
        and not by_name.match(name)
    ]
    if left_out:
        _log.warning(
            "target_modules='all' selects the linear layers of a transformers model and excludes %s. Name these "
            "layers to adapt them.",
            some_of(left_out),
        )
    return set(left_out)


def _is_linear(target: Target) -> bool:
    return isinstance(target.layer, nn.Linear) or target.kind in KINDS_OF_OTHERS.values()


def _say_what_is_not_reached(module: nn.Module, selected: list[Target], in_full: set[nn.Module]) -> None:
    """Name the weights of layers that no adapter is for."""
    reached = {target.layer for target in selected} | in_full
    missed, flat = [], []
    for name, layer in layers_of(module):
        if layer in reached or kind_of(layer) is not BY_NAME or isinstance(layer, ParametrizationList):
            continue
        for key in _weights_of(layer):
            tensor = getattr(layer, key)
            if is_lazy(tensor):
                continue
            if tensor.dim() > 1:
                missed.append(f"{name}.{key}".lstrip("."))
            elif key == "weight" and not _is_norm(layer):
                flat.append(f"{name}.{key}".lstrip("."))
    if missed:
        _log.warning(
            "target_modules='all' reaches no parameters outside the supported layers: %s stay frozen. To train "
            "these, name them in target_parameters, or their modules in modules_to_save.",
            some_of(missed),
        )
    if flat:
        _log.warning(
            "target_modules='all' reaches no weights of one dimension: %s stay frozen. To train these, name their "
            "modules in modules_to_save.",
            some_of(flat),
        )


def _is_norm(layer: nn.Module) -> bool:
    """Return whether a layer seems to be a norm, whose weight is a vector of scales. Libraries have their own norms."""
    return "norm" in type(layer).__name__.lower() or type(layer).__module__.startswith("torch.nn")
