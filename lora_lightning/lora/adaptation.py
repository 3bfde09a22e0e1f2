"""Attaches adapters to a module, and detaches, chooses, switches off and merges them.

The layers are the only record of adapters, and each adapter holds its configuration. The module that `attach` was
called with remembers what was trainable before, and the modules that are trained in full.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_lightning.lora.adapter import Adapter, Adapters, drop_gradients, is_quantized, is_sharded
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.freeze import freeze, keep_frozen, unfreeze_statistics
from lora_lightning.lora.layers import (
    Adapted,
    adapters_of,
    bare_layers,
    bias_with_updates,
    computing_without_updates,
    is_computed,
    place,
    require_own_class,
    restore,
    stored,
    stored_bias,
    take_away,
    with_updates,
)
from lora_lightning.lora.modules_to_save import SavedModules, shared_memory
from lora_lightning.lora.packed import become_linear, keep_packing
from lora_lightning.lora.selection import bias_keys, check_name, select, variant_of
from lora_lightning.lora.targets import AdaptedWeight, Target
from lora_lightning.wording import some_of


@dataclass
class Attachment:
    """Records what a module was before its first adapters, and what they train in full.

    Attributes:
        was_trainable: Names of the parameters that required gradients.
        was_frozen: Names of the parameters that did not. These are not known if there were adapters of another module,
            for example in an encoder that two networks share.
        saved: The modules that are trained in full, by the name of the adapters that they belong to.
        hooks: The hooks that freeze norm layers which were replaced.
    """

    was_trainable: frozenset[str]
    was_frozen: frozenset[str] = frozenset()
    saved: dict[str, SavedModules] = field(default_factory=dict)
    hooks: list[RemovableHandle] = field(default_factory=list)

    @classmethod
    def of(cls, module: nn.Module) -> Attachment:
        """Return the records of a module before its first adapters."""
        flags = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        frozen = () if is_adapted(module) else (name for name, trainable in flags.items() if not trainable)
        return cls(frozenset(name for name, trainable in flags.items() if trainable), frozenset(frozen))


def attach(module: nn.Module, config: LoRAConfig, name: str = "default") -> list[str]:
    """Freeze `module`, adapt the matching layers in place, and return their dotted names (`""` for `module` itself).

    Gradients of what is frozen are dropped, so that an optimizer of before does not move it.

    Args:
        module: Any module, for example the backbone of a classifier.
        config: Selects the layers and configures the adapters.
        name: Name of these adapters. Adapters with other names become inactive until `set_adapter`.

    Raises:
        ValueError: If the name exists or cannot be that of a module, a pattern matches nothing, a layer cannot be
            adapted, or `init="eva"` needs batches. `module` is then unchanged.
        RuntimeError: Within `bare`, `disabled` or `merged`, or if the class of an adapted layer was replaced, as by
            `fully_shard`.
    """
    if config.init == "eva":
        raise ValueError(
            "init='eva' starts from the inputs of the layers: use lora.eva(module, config, batches).attach(module), or "
            "LoRAFinetuning(init='eva') in a training."
        )
    return attach_as_configured(module, config, name)


def attach_as_configured(module: nn.Module, config: LoRAConfig, name: str) -> list[str]:
    """Attach adapters as `attach` does, with a random A for `init="eva"`, whose values are known elsewhere."""
    module = unwrapped(module)
    if name in _names(module):
        raise ValueError(
            f"This {type(module).__name__} already has adapters on "
            f"{[found.name for found in adapted_weights(module, name)]}. Call detach(module) or merge(module) first, "
            "or give the new adapters another name."
        )
    with computing_without_updates(module):
        return attach_to(module, select(module, config), config, name)


def attach_to(module: nn.Module, selected: list[Target], config: LoRAConfig, name: str) -> list[str]:
    """Attach adapters to weights that were selected, as `attach` does."""
    check_name(module, selected, name)
    require_no_context(module, "attach adapters")
    for target in selected:
        require_own_class(target.layer)
    biases = bias_keys(module, selected, config)
    made = [_make(target, config) for target in selected]  # nothing has changed so far
    attachment = vars(module).get("_lora_attachment") or Attachment.of(module)
    placed, chosen = list[nn.Module](), [saved for saved in attachment.saved.values() if saved.is_chosen]
    try:
        if config.modules_to_save or biases:
            for saved in chosen:
                saved.choose(False)
            attachment.saved[name] = SavedModules(module, config, biases)
        for target, adapter in zip(selected, made, strict=True):
            placed.append(target.layer)
            place(target.layer, target.parameter, target.kind, name, adapter)
    except BaseException:
        for layer in placed:
            take_away(layer, name)
        if name in attachment.saved:
            attachment.saved.pop(name).choose(False)
        for saved in chosen:
            saved.choose(True)
        raise
    vars(module)["_lora_attachment"] = attachment
    keep_packing(module)
    activate(module, [name], [name])
    return [found.name for found in adapted_weights(module)]


def adapter_names(module: nn.Module) -> list[str]:
    """Return the names of all adapters. Those that are active come first.

    Raises:
        ValueError: If `module` has no adapters.
    """
    attachment_of(module)
    return _names(module)


def active_names(module: nn.Module) -> list[str]:
    """Return the names of the active adapters.

    Raises:
        ValueError: If `module` has no adapters.
    """
    attachment_of(module)
    return list(dict.fromkeys(name for adapters in _containers(module) for name in adapters.active))


def require_active_names(module: nn.Module) -> list[str]:
    """Return the names of the active adapters.

    Raises:
        ValueError: If there are none, as within `bare`, or after it where all adapted layers were replaced.
    """
    names = active_names(module)
    if not names:
        raise ValueError(
            f"This {type(module).__name__} has no adapters now: ask outside of bare(net), or attach new ones if their "
            "layers were replaced."
        )
    return names


def trained_names(module: nn.Module) -> list[str]:
    """Return the names of the adapters that are trained.

    Raises:
        ValueError: If `module` has no adapters.
    """
    attachment_of(module)
    return list(dict.fromkeys(name for adapters in _containers(module) for name in adapters.trained))


def the_active_name(module: nn.Module) -> str:
    """Return the name of the active adapters, if they have a single one.

    Raises:
        ValueError: If several are active, or none.
    """
    names = require_active_names(module)
    if len(names) > 1:
        raise ValueError(
            f"The adapters {', '.join(map(repr, names))} of this {type(module).__name__} are active: say which of them "
            f"is meant, for example name={names[-1]!r}."
        )
    return names[0]


def set_adapter(module: nn.Module, name: str | Sequence[str], trained: str | Sequence[str] | None = None) -> None:
    """Activate the adapters with these names, whose updates add up. The others become inactive and keep their values.

    What is not trained is frozen, and its gradients are dropped. Modules that are trained in full with adapters are
    trained or frozen with them. Set the adapters before the module is wrapped by `DistributedDataParallel`, which
    remembers what was trainable.

    Args:
        module: A module with adapters.
        name: One name, or several.
        trained: Which of them to train, all by default. The others are frozen.

    Raises:
        ValueError: If there are no adapters with one of these names, or several of them train the same module or bias
            in full, so that these values cannot add up. Nothing changes then.
        RuntimeError: Within `bare` or `merged`, or if the adapters are distributed by `fully_shard`.

    Example::

        set_adapter(net, ["digit7", "digit9"], trained=["digit9"])
    """
    module = unwrapped(module)
    attachment = attachment_of(module)
    require_no_bare_layers(module)
    names = _listed(name)
    of_training = names if trained is None else _listed(trained)
    _check_names(module, names)
    strangers = [other for other in of_training if other not in names]
    if strangers:
        raise ValueError(
            f"trained={strangers} cannot be trained, since only {', '.join(map(repr, names))} become active. Name them "
            "there as well."
        )
    _check_overlap(attachment, names)
    if any(adapters.is_merged for adapters in _containers(module)):
        raise RuntimeError("The adapters are merged for a while: choose others outside of merged(net).")
    if any(is_sharded(parameter) for adapters in _containers(module) for parameter in adapters.parameters()):
        raise RuntimeError(
            "The adapters are distributed by fully_shard, which has noted what is trained. Choose one before that."
        )
    activate(module, names, of_training)


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _check_names(module: nn.Module, names: list[str]) -> None:
    """Check that there are adapters with these names.

    Raises:
        ValueError: If a name is missing or occurs twice, or there is none.
    """
    known = _names(module)
    for name in names:
        _require_name(module, name)
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"{names} cannot become active: expected different names among {', '.join(known)}.")


def _require_name(module: nn.Module, name: str) -> None:
    known = _names(module)
    if name not in known:
        raise ValueError(f"This {type(module).__name__} has no adapters named {name!r}; it has {', '.join(known)}.")


def _check_overlap(attachment: Attachment, names: list[str]) -> None:
    """Check that no two of these adapters have a module that both train in full, whose values cannot add up.

    Raises:
        ValueError: If there are any. The message names all of these adapters.
    """
    owners: dict[str, list[str]] = {}
    for name in names:
        for key in attachment.saved[name].keys if name in attachment.saved else ():
            owners.setdefault(key, []).append(name)
    shared = {key: found for key, found in owners.items() if len(found) > 1}
    if shared:
        together = [name for name in names if any(name in found for found in shared.values())]
        raise ValueError(
            f"The adapters {', '.join(map(repr, together))} cannot be active together: each of them has trained values "
            f"of {some_of(shared)} in full, and these do not add up. Activate one of them."
        )


@contextmanager
def alone(module: nn.Module, name: str) -> Iterator[None]:
    """Give the modules that are trained in full the values that go with the adapters of one name, within this context.

    Those that other adapters train have their original values. The adapters themselves stay as they are.
    """
    attachment = vars(unwrapped(module)).get("_lora_attachment")
    saved = attachment.saved if isinstance(attachment, Attachment) else {}
    chosen = {other: values.is_chosen for other, values in saved.items()}
    try:
        _choose(saved, {other: other == name for other in chosen})
        yield
    finally:
        _choose(saved, chosen)


def _choose(saved: Mapping[str, SavedModules], chosen: Mapping[str, bool]) -> None:
    """Put the values of some adapters into the modules that are trained in full, after those of others are out."""
    for name in sorted(chosen, key=chosen.__getitem__):
        saved[name].choose(chosen[name])


def activate(module: nn.Module, names: Sequence[str], trained: Sequence[str]) -> None:
    """Activate the adapters with these names, train some of them, and freeze all else."""
    attachment = attachment_of(module)
    _choose(attachment.saved, {name: name in names for name in attachment.saved})
    in_full = [attachment.saved[name] for name in trained if name in attachment.saved]
    freeze(module, [child for saved in in_full for child in saved.modules])
    for saved in in_full:
        saved.train()
    for adapters in _containers(module):
        adapters.activate(names, trained)
    drop_gradients(module)
    for hook in attachment.hooks:
        hook.remove()
    attachment.hooks = keep_frozen(module)


def delete_adapter(module: nn.Module, name: str) -> None:
    """Remove the adapters with this name.

    If no others are active, the next ones become active and are trained. The last ones are detached.

    Raises:
        ValueError: If there are no adapters with this name.
        RuntimeError: Within `bare`, within `merged` if they are active and not the last, or if the class of a layer was
            replaced after `attach`, as `fully_shard` does.
    """
    module = unwrapped(module)
    attachment_of(module)
    require_no_bare_layers(module)
    _require_name(module, name)
    for layer in _layers(module):
        require_own_class(layer)
    others = [other for other in _names(module) if other != name]
    if not others:
        detach(module)
        return
    active, trained = active_names(module), trained_names(module)
    if active == [name]:
        set_adapter(module, others[0])
    elif name in active:
        active.remove(name)
        set_adapter(module, active, [other for other in trained if other != name])
    for layer in _layers(module):
        take_away(layer, name)
    attachment_of(module).saved.pop(name, None)


def detach(module: nn.Module) -> None:
    """Remove all adapters and restore `module` bitwise, including `requires_grad`.

    It has to be the module that `attach` was called with.

    Raises:
        ValueError: If `module` has no adapters of its own.
        RuntimeError: If the class of a layer was replaced after `attach`, as `fully_shard` does.
    """
    module = unwrapped(module)
    attachment_of(module)
    require_no_bare_layers(module)
    for layer in _layers(module):
        require_own_class(layer)
    for _, saved in _saved(module):
        saved.choose(False)
    _leave_plain(module)


@contextmanager
def disabled(module: nn.Module, names: str | Sequence[str] | None = None) -> Iterator[None]:
    """Compute with the base alone, or without some of the active adapters, within this context.

    A module without adapters is not changed. Contexts may overlap, and the last one to end enables the adapters. Other
    threads compute with the base as well meanwhile.

    Args:
        module: A module with adapters.
        names: Names of the adapters to leave out, with what is trained in full with them. `None` leaves out all.

    Raises:
        ValueError: If there are no adapters with one of these names.

    Example::

        with disabled(net, "digit9"):  # computes with the others
            before = net(x)
    """
    module, key = unwrapped(module), object()
    chosen = None if names is None else _listed(names)
    for name in chosen or ():
        _require_name(module, name)
    containers = _containers(module)
    saved = [values for name, values in _saved(module) if chosen is None or name in chosen]
    try:
        for adapters in containers:
            adapters.pause(key, chosen)
        for values in saved:
            values.pause(key)
        yield
    finally:
        for adapters in containers:
            adapters.resume(key)
        for values in saved:
            values.resume(key)


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
            others, an adapter is not finite, or there is a bypass. `module` is then unchanged.
        RuntimeError: Within `bare`, `disabled` or `merged`, or if the class of a layer was replaced after `attach`.
    """
    module = unwrapped(module)
    attachment_of(module)
    require_no_context(module, "merge")
    for layer in _layers(module):
        require_own_class(layer)
    found = _mergeable(module)
    for weight in found:
        if is_computed(weight.layer, weight.parameter):
            raise ValueError(
                f"The weight of {weight.name!r} is computed from other parameters (pruned, normed or parametrized), so "
                "there is nothing to merge into. Make it permanent first, or keep the adapters unmerged."
            )
        if _adds_bias(weight) and stored_bias(weight.layer) is None:
            raise ValueError(
                f"The adapter of {weight.name!r} has a bias (lora_bias=True), and the layer has none to merge it into. "
                "Keep the adapters unmerged."
            )
    new, biases = [_merged_weight(weight) for weight in found], [_merged_bias(weight) for weight in found]
    if check_finite:
        merged_values = zip(found, new, biases, strict=True)
        bad = [weight.name for weight, value, bias in merged_values if not _is_finite(weight, value, bias)]
        if bad:
            raise ValueError(
                f"The adapters of {some_of(map(repr, bad))} contain NaN or infinity, or their sum with the base is too "
                "large for its dtype: merging would destroy the base."
            )
    packed = [
        weight for weight in found if weight.kind.is_packed or is_quantized(stored(weight.layer, weight.parameter))
    ]
    if packed:
        warnings.warn(
            f"The weights of {some_of(weight.name for weight in packed)} were quantized and are dense after merging. "
            "Quantize the merged model again if necessary.",
            stacklevel=2,
        )
    _leave_plain(module)
    for weight, value in zip(found, new, strict=True):
        if weight.kind.is_packed:
            become_linear(weight.layer, value)
        elif weight in packed:
            weight.layer._parameters[weight.parameter] = nn.Parameter(value, requires_grad=False)
        else:
            stored(weight.layer, weight.parameter).data.copy_(value)
    for weight, bias in zip(found, biases, strict=True):
        own = stored_bias(weight.layer)
        if bias is not None and own is not None:
            own.data.copy_(bias)


def adapted_weights(module: nn.Module, name: str | None = None) -> list[AdaptedWeight]:
    """Return the adapted weights in the order of `module`, with the active adapters, or with those of a given name."""
    found = []
    for layer_name, layer in unwrapped(module).named_modules():
        if not isinstance(layer, Adapted):
            continue
        for parameter, kind in layer.lora_kinds:
            adapters = adapters_of(layer, parameter)
            for chosen in adapters.active if name is None else (name,):
                if chosen in adapters.names():
                    adapter = adapters.adapter(chosen)
                    rank, sizes = adapter.rank, (len(adapter.lora_B), adapter.lora_A.shape[-1])
                    found.append(
                        AdaptedWeight(
                            layer_name, layer, parameter, kind, rank, sizes, adapter_name=chosen, adapter=adapter
                        )
                    )
    return found


def is_adapted(module: nn.Module) -> bool:
    """Return whether any layer of `module` has an adapter."""
    return any(isinstance(layer, Adapted) for layer in module.modules())


def config_of(module: nn.Module, name: str | None = None) -> LoRAConfig:
    """Return the configuration of the adapters with a name, or of the active ones.

    Of several active ones, these are the first that are trained, or else the first.

    Raises:
        ValueError: If there are none.
    """
    attachment_of(module)
    chosen = name or [*trained_names(module), *require_active_names(module)][0]
    found = adapted_weights(module, chosen)
    if not found:
        raise ValueError(
            f"This {type(module).__name__} has no adapters named {chosen!r}; it has {', '.join(_names(module))}."
        )
    return found[0].adapter.config


def attachment_of(module: nn.Module) -> Attachment:
    """Return the records of `attach` on `module`.

    Raises:
        ValueError: If `attach` was not called with this module.
    """
    module = unwrapped(module)
    found = vars(module).get("_lora_attachment")
    if isinstance(found, Attachment):
        return found
    inner = [name for name, child in module.named_modules() if "_lora_attachment" in vars(child)]
    hint = f"Its submodule {inner[0]!r} has adapters: pass that one." if inner else "Call attach(module, config) first."
    raise ValueError(f"This {type(module).__name__} has no adapters of its own. {hint}")


def require_no_context(module: nn.Module, what: str) -> None:
    """Refuse to change a module within the contexts `bare`, `disabled` and `merged`.

    Raises:
        RuntimeError: If it is within one.
    """
    require_no_bare_layers(module)
    containers = _containers(module)
    if any(adapters.is_paused for adapters in containers):
        raise RuntimeError(f"The adapters are disabled: {what} outside of disabled(net).")
    if any(adapters.is_merged for adapters in containers):
        raise RuntimeError(f"The adapters are merged for a while: {what} outside of merged(net).")


def require_no_bare_layers(module: nn.Module) -> None:
    """Refuse to change a module within the context `bare`.

    Raises:
        RuntimeError: If it is within it.
    """
    names = [name for name, layer in module.named_modules() if layer in bare_layers]
    if names:
        raise RuntimeError(f"The adapters of {some_of(map(repr, names))} are set aside: do this outside of bare(net).")


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module without the wrappers of `torch.compile` and Lightning Fabric."""
    inner = module._modules.get("_orig_mod", module._modules.get("_original_module"))
    return module if inner is None else unwrapped(inner)


def _make(target: Target, config: LoRAConfig) -> Adapter:
    """Return an untrained adapter for a weight, on the device of the weight."""
    variant = variant_of(target, config)
    weight = target.weight
    device = target.dense_weight().device if weight is None else weight.device
    values = target.dense_weight() if variant.reads_weight else target.outline()
    return variant(values, target.layout, config, target.rank, config.scaling_of(*target.names), device)


def _leave_plain(module: nn.Module) -> None:
    """Remove the adapters and the records of `attach`. Modules that were trained in full keep their values."""
    for layer in _layers(module):
        restore(layer)
    unfreeze_statistics(module)
    trainable: set[str] = set()
    frozen: set[str] = set()
    for name, child in module.named_modules():
        attachment = vars(child).pop("_lora_attachment", None)
        if isinstance(attachment, Attachment):
            trainable |= {f"{name}.{key}".lstrip(".") for key in attachment.was_trainable}
            frozen |= {f"{name}.{key}".lstrip(".") for key in attachment.was_frozen}
            for hook in attachment.hooks:
                hook.remove()
    for name, parameter in module.named_parameters():
        if name in trainable or name in frozen:
            parameter.requires_grad_(name in trainable)


def _layers(module: nn.Module) -> list[Adapted]:
    return [layer for layer in module.modules() if isinstance(layer, Adapted)]


def _containers(module: nn.Module) -> list[Adapters]:
    return [adapters_of(layer, parameter) for layer in _layers(unwrapped(module)) for parameter, _ in layer.lora_kinds]


def _saved(module: nn.Module) -> list[tuple[str, SavedModules]]:
    """Return what is trained in full, with the names of the adapters that it belongs to."""
    records = [vars(child).get("_lora_attachment") for child in unwrapped(module).modules()]
    return [item for record in records if isinstance(record, Attachment) for item in record.saved.items()]


def _names(module: nn.Module) -> list[str]:
    containers = _containers(module)
    active = [name for adapters in containers for name in adapters.active]
    return list(dict.fromkeys([*active, *(name for adapters in containers for name in adapters.names())]))


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


@torch.no_grad()
def _merged_weight(weight: AdaptedWeight) -> Tensor:
    merged = weight.adapters.in_effect.merged
    if merged is not None:
        return merged
    chosen = tuple(map(weight.adapters.adapter, weight.adapters.active))
    with computing_without_updates(weight.layer):
        return with_updates(weight.layer, weight.adapters, chosen)


@torch.no_grad()
def _merged_bias(weight: AdaptedWeight) -> Tensor | None:
    """Return b + Σ s c, or `None` if no active adapter has a bias."""
    if not _adds_bias(weight):
        return None
    in_effect = weight.adapters.in_effect
    if in_effect.merged is not None:
        return in_effect.bias
    return bias_with_updates(weight.layer, tuple(map(weight.adapters.adapter, weight.adapters.active)))


def _adds_bias(weight: AdaptedWeight) -> bool:
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
