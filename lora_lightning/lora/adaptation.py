"""Attaches adapters to a module, and detaches, chooses and switches them off.

The layers are the only record of adapters, and the module that `attach` was called with has an `Attachment`: see
`record.py`, which also answers questions such as `adapted_weights`. Merging is in `merging.py`. It ends as `detach`
does, with `leave_plain`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lora_lightning.lora.adapter import Adapter, drop_gradients, is_sharded
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.freeze import freeze, keep_frozen, unfreeze_statistics
from lora_lightning.lora.layers import place, require_own_class, restore, take_away, without_power_iteration
from lora_lightning.lora.modules_to_save import SavedModules, choose
from lora_lightning.lora.packed import keep_packing
from lora_lightning.lora.record import (
    Attachment,
    active_names,
    adapted_layers,
    adapted_weights,
    adapters_in,
    attachment_of,
    names_in,
    record_of,
    require_name,
    require_no_bare_layers,
    require_no_context,
    require_not_merged,
    saved_in,
    trained_names,
    unwrapped,
)
from lora_lightning.lora.selection import bias_keys, check_name, select, variant_of
from lora_lightning.lora.targets import Target
from lora_lightning.wording import some_of


def attach(module: nn.Module, config: LoRAConfig, name: str = "default") -> list[str]:
    """Freeze `module`, adapt the matching layers in place, and return their dotted names (`""` for `module` itself).

    For a module that reads its weights, these are the names of the weights, for example `lstm.weight_ih_l0`.

    Gradients of what is frozen are dropped, so that an optimizer of before does not move it.

    Args:
        module: Any module, for example the backbone of a classifier.
        config: Selects the layers and configures the adapters.
        name: Name of these adapters. Adapters with other names become inactive until `set_adapter`.

    Raises:
        ValueError: If the name exists or cannot be that of a module, a pattern matches nothing, a layer cannot be
            adapted, or `init="eva"` needs batches. `module` is then unchanged.
        RuntimeError: Within `bare`, `disabled` or `merged`, or if other adapters are distributed by `fully_shard`, or
            the class of an adapted layer was replaced.
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
    if name in names_in(module):
        raise ValueError(
            f"This {type(module).__name__} already has adapters on "
            f"{[found.name for found in adapted_weights(module, name)]}. Call detach(module) or merge(module) first, "
            "or give the new adapters another name."
        )
    with without_power_iteration(module):
        return attach_to(module, select(module, config), config, name)


def attach_to(module: nn.Module, selected: list[Target], config: LoRAConfig, name: str) -> list[str]:
    """Attach adapters to weights that were selected, as `attach` does."""
    check_name(selected, name)
    require_no_context(module, "attach adapters")
    _require_not_sharded(module)
    for target in selected:
        require_own_class(target.layer)
    biases = bias_keys(module, selected, config)
    made = [_make(target, config) for target in selected]  # nothing has changed so far
    attachment = record_of(module) or Attachment.of(module)
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
    require_not_merged(module, "choose others")
    _require_not_sharded(module)
    activate(module, names, of_training)


def _require_not_sharded(module: nn.Module) -> None:
    """Refuse to change what is trained.

    Raises:
        RuntimeError: If the adapters are distributed by `fully_shard`.
    """
    if any(is_sharded(parameter) for adapters in adapters_in(module) for parameter in adapters.parameters()):
        raise RuntimeError(
            "The adapters are distributed by fully_shard, which has noted what is trained. Attach and choose adapters "
            "before that."
        )


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _check_names(module: nn.Module, names: list[str]) -> None:
    """Check that there are adapters with these names.

    Raises:
        ValueError: If a name is missing or occurs twice, or there is none.
    """
    known = names_in(module)
    for name in names:
        require_name(module, name)
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"{names} cannot become active: expected different names among {', '.join(known)}.")


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


def activate(module: nn.Module, names: Sequence[str], trained: Sequence[str]) -> None:
    """Activate the adapters with these names, train some of them, and freeze all else."""
    attachment = attachment_of(module)
    choose(attachment.saved, {name: name in names for name in attachment.saved})
    in_full = [attachment.saved[name] for name in trained if name in attachment.saved]
    freeze(module, [child for saved in in_full for child in saved.modules])
    for saved in in_full:
        saved.train()
    for adapters in adapters_in(module):
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
        RuntimeError: Within `bare`, or if the class of a layer was replaced after `attach`, as `fully_shard` does. If
            they are active and others are left, for the reasons of `set_adapter` as well.
    """
    module = unwrapped(module)
    attachment_of(module)
    require_no_bare_layers(module)
    require_name(module, name)
    for layer in adapted_layers(module):
        require_own_class(layer)
    others = [other for other in names_in(module) if other != name]
    if not others:
        detach(module)
        return
    active, trained = active_names(module), trained_names(module)
    if active == [name]:
        set_adapter(module, others[0])
    elif name in active:
        active.remove(name)
        set_adapter(module, active, [other for other in trained if other != name])
    for layer in adapted_layers(module):
        take_away(layer, name)
    attachment_of(module).saved.pop(name, None)


def detach(module: nn.Module) -> None:
    """Remove all adapters and restore `module` bitwise, including `requires_grad`.

    It has to be the module that `attach` was called with. Gradients that `attach` dropped do not come back, and the
    4-bit layers of bitsandbytes keep their packing.

    Raises:
        ValueError: If `module` has no adapters of its own.
        RuntimeError: Within `bare`, or if the class of a layer was replaced after `attach`, as `fully_shard` does.
    """
    module = unwrapped(module)
    attachment_of(module)
    require_no_bare_layers(module)
    for layer in adapted_layers(module):
        require_own_class(layer)
    for _, saved in saved_in(module):
        saved.choose(False)
    leave_plain(module)


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
        require_name(module, name)
    containers = adapters_in(module)
    saved = [values for name, values in saved_in(module) if chosen is None or name in chosen]
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


def _make(target: Target, config: LoRAConfig) -> Adapter:
    """Return an untrained adapter for a weight, on the device of the weight."""
    variant = variant_of(target, config)
    weight = target.weight
    device = target.dense_weight().device if weight is None else weight.device
    values = target.dense_weight() if variant.reads_weight else target.outline()
    return variant(values, target.layout, config, target.rank, config.scaling_of(*target.names), device)


def leave_plain(module: nn.Module) -> None:
    """Remove the adapters and the records of `attach`. Modules that were trained in full keep their values."""
    for layer in adapted_layers(module):
        restore(layer)
    unfreeze_statistics(module)
    trainable: set[str] = set()
    frozen: set[str] = set()
    for name, child in module.named_modules():
        attachment = record_of(child)
        if attachment is not None:
            del vars(child)["_lora_attachment"]
            trainable |= {f"{name}.{key}".lstrip(".") for key in attachment.was_trainable}
            frozen |= {f"{name}.{key}".lstrip(".") for key in attachment.was_frozen}
            for hook in attachment.hooks:
                hook.remove()
    for name, parameter in module.named_parameters():
        if name in trainable or name in frozen:
            parameter.requires_grad_(name in trainable)
