"""The verbs: attach and detach adapters, switch them off, fold them in, look at them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_lightning.lora.attached import (
    Attachment,
    Site,
    adapter_names,
    attachment,
    attachments,
    bare,
    change_class,
    exchange,
    freeze_base,
    holder,
    modules_to_train,
    set_aside,
    sites,
    take_off,
    whole_keys,
)
from lora_lightning.lora.bypass import LoRABypass
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.effective import adapted_class
from lora_lightning.lora.frozen import thaw_statistics
from lora_lightning.lora.selection import Candidate, bypass_weight, read_elsewhere, select
from lora_lightning.lora.update import LowRankUpdate, is_quantised


def attach(module: nn.Module, config: LoRAConfig, name: str = "default") -> list[str]:
    """Freezes `module` and adapts the matching layers in place.

    Freezing also stops the running statistics of norm layers, whatever mode the module is put in. Either everything
    is attached or, if an error is raised, the module is unchanged.

    Args:
        module: Any module that holds layers, for example a classifier's backbone.
        config: Which layers, and how.
        name: What to call these adapters. Adapters of other names are set aside, for `switch_adapter`.

    Returns:
        The dotted names of what is adapted, in the module's own order; the empty name stands for `module` itself.

    Raises:
        ValueError: If `module` has adapters of this name already, a target matches no supported layer, a rank exceeds
            a layer's size, or a layer can't be adapted; the message names them all.

    Example::

        names = attach(backbone, LoRAConfig(rank=1, targets=["linear1"]))
        optimizer = torch.optim.Adam(adapter_parameters(backbone))
    """
    if is_adapted(module) and name in adapter_names(module):
        raise ValueError(
            f"This {type(module).__name__} has adapters already, on {list(adapted_layers(module))}. "
            "Call detach(module) or merge(module) first, or give these another name."
        )
    with bare(module):
        selected = select(module, config)
    return attach_beside(module, config, selected, name)


def attach_beside(module: nn.Module, config: LoRAConfig, selected: list[Candidate], name: str) -> list[str]:
    """`attach` for weights that were selected before; adapters that are there are set aside."""
    if is_adapted(module):
        was_trainable, shelf = attachment(module).was_trainable, set_aside(module)
    else:
        was_trainable, shelf = frozenset(key for key, value in module.named_parameters() if value.requires_grad), {}
    state = module.state_dict(keep_vars=True)
    trained = [key for key in state if any(key.startswith(f"{name}.") for name in modules_to_train(module, config))]
    module._lora_attachment = Attachment(  # type: ignore[assignment]
        config, name, was_trainable, {key: _kept(state[key]) for key in trained}, shelf
    )
    freeze_base(module)
    put_fresh_on(module, config, selected)
    return list(adapted_layers(module))


def put_fresh_on(module: nn.Module, config: LoRAConfig, selected: list[Candidate]) -> None:
    """Puts fresh adapters on a frozen module that has none."""
    elsewhere = read_elsewhere(module)
    by_layer: dict[str, list[Candidate]] = {}
    for candidate in selected:
        by_layer.setdefault(candidate.layer_name, []).append(candidate)
    if config.bypass:
        by_layer.setdefault("", [])
    for name, of_layer in by_layer.items():
        layer = of_layer[0].layer if of_layer else module
        side_path: type[LowRankUpdate] | None = LoRABypass if not name and config.bypass else None
        read: tuple[str, ...] = ()
        for candidate in of_layer:
            side_path = candidate.side_path or side_path
            if candidate.side_path is None or (name.rpartition(".")[2], "weight") in elsewhere:
                read += (candidate.parameter,)
        change_class(layer, adapted_class(type(layer), side_path, read))
    if config.bypass:
        weight, scaling = bypass_weight(module, config.bypass), config.scaling_of("")
        holder(module, None).lora_adapt(weight, config.rank_of(""), scaling, config)
    for candidate in selected:
        assert candidate.weight is not None
        rank, scaling = config.rank_of(*candidate.names), config.scaling_of(*candidate.names)
        holder(candidate.layer, candidate.parameter).lora_adapt(candidate.weight, rank, scaling, config)


def detach(module: nn.Module) -> None:
    """Takes the adapters off: the module is bitwise what it was before `attach`, trainability too.

    Raises:
        ValueError: If `module` is not one that `attach` was called with.
    """
    exchange(module, attachment(module).originals)
    _leave_plain(module)


@contextmanager
def disabled(module: nn.Module) -> Iterator[None]:
    """Within this context the base model answers; a module without adapters is left alone."""
    updates = [site.update for site in sites(module)]
    before = [update.lora_active for update in updates]
    originals = {
        f"{name}.{key}".lstrip("."): value
        for name, attached in attachments(module).items()
        for key, value in attached.originals.items()
    }
    trained = exchange(module, originals)
    try:
        for update in updates:
            update.lora_switch(False)
        yield
    finally:
        for update, active in zip(updates, before, strict=True):
            update.lora_switch(active)
        exchange(module, trained)


@contextmanager
def merged(module: nn.Module) -> Iterator[None]:
    """Within this context the adapters are folded into the weights; afterwards the weights are bitwise as before.

    It costs a copy of the adapted weights, and makes a forward pass as fast as the base's. For inference: parameters
    changed inside the context are lost.

    Raises:
        ValueError: If an adapted weight is shared with another layer, which the merge would change too, or if there
            is a bypass, which has no weight to be folded into.
    """
    attachment(module)
    _refuse_to_fold(module)
    # An adapter that is disabled, or folded already by an outer context, stays out.
    folded = [site for site in sites(module) if site.update.lora_active]
    quantised = {site.name: site.weight for site in folded if is_quantised(site.weight)}
    saved = {site.name: site.weight.detach().clone() for site in folded if site.name not in quantised}
    try:
        for site in folded:
            _fold(site)
            site.update.lora_switch(False)
        yield
    finally:
        for site in folded:
            if site.name in quantised:
                site.weight = quantised[site.name]
            else:
                site.weight.data.copy_(saved[site.name])
            site.update.lora_switch(True)


def merge(module: nn.Module) -> None:
    """Folds the adapters into the weights for good and leaves plain layers, trainable as before `attach`.

    The weight in effect is formed in the adapter's precision and rounded once to the weight's. A quantised weight becomes a
    dense one, with a warning: quantising the sum again would lose most of an update that is smaller than a step of it.

    Raises:
        ValueError: If `module` is not adapted, an adapted weight is shared with another layer, or there is a bypass.
    """
    attachment(module)
    _refuse_to_fold(module)
    found = sites(module)
    if quantised := [site.name for site in found if is_quantised(site.weight)]:
        warnings.warn(
            f"The weights of {', '.join(quantised)} were quantised; merged, they are dense tensors of {found[0].weight.dtype}. "
            "Quantise the merged model again if that is wanted.",
            stacklevel=2,
        )
    for site in found:
        _fold(site)
    _leave_plain(module)


def is_adapted(module: nn.Module) -> bool:
    """Whether any layer of the module has an adapter."""
    return any(isinstance(layer, LowRankUpdate) for layer in module.modules())


def is_fresh(module: nn.Module) -> bool:
    """Whether there are adapters, and all of them are as they began: ΔW is zero."""
    return is_adapted(module) and all(site.update.lora_is_fresh() for site in sites(module))


def adapted_layers(module: nn.Module) -> dict[str, LowRankUpdate]:
    """What holds the adapters, by the dotted name of what is adapted."""
    return {site.name: site.update for site in sites(module)}


def adapter_parameters(module: nn.Module) -> list[nn.Parameter]:
    """What an optimizer trains: the adapters' parameters and those of modules trained whole, in the module's order."""
    whole = whole_keys(module)
    return [value for name, value in module.named_parameters() if is_adapter_key(name) or name in whole]


def adapter_state(module: nn.Module) -> dict[str, Tensor]:
    """What training changes, by state-dict key (`linear1.lora_A`, ...): detached, sharing memory with the module."""
    whole = whole_keys(module)
    return {key: value for key, value in module.state_dict().items() if is_adapter_key(key) or key in whole}


def is_adapter_key(key: str) -> bool:
    """Whether a parameter name or state-dict key belongs to an adapter and not to its base."""
    return key.rpartition(".")[2].startswith("lora_")


def fingerprint(module: nn.Module) -> str:
    """A digest (SHA-256, hexadecimal) of the base: names, shapes, dtypes and values of its parameters and buffers.

    Adapters do not count, so it is the same before `attach` and after training; nor do modules trained whole beside
    them, once they are. Buffers that are not part of the state dict do not count either.
    """
    digest, whole = hashlib.sha256(), whole_keys(module)
    for key, value in module.state_dict().items():
        if is_adapter_key(key) or key in whole or not isinstance(value, Tensor):
            continue
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}\n".encode())
        for part in _parts(value.detach()):
            digest.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parts(value: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor is made of: itself, or what a quantised one holds."""
    if not is_quantised(value):
        return [value]
    names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined] # every tensor subclass of torchao has it
    return [getattr(value, name) for name in names]


def _kept(value: Tensor) -> Tensor:
    copy = value.detach().clone()
    return nn.Parameter(copy, requires_grad=False) if isinstance(value, nn.Parameter) else copy


def _leave_plain(module: nn.Module) -> None:
    was_trainable = attachment(module).was_trainable
    take_off(module)
    thaw_statistics(module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in was_trainable)
    del module._lora_attachment


@torch.no_grad()
def _fold(site: Site) -> None:
    folded = site.update.lora_weight_in_effect(site.weight)
    if is_quantised(site.weight):
        site.weight = nn.Parameter(folded, requires_grad=False)
    else:
        # Not as an operation that autograd counts: after `merged`, a backward pass may still be to come.
        site.weight.data.copy_(folded)


def _refuse_to_fold(module: nn.Module) -> None:
    """A merge writes into W; a second layer that holds the same W would be changed without being asked."""
    owners: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr() or id(parameter), []).append(name)
    for site in sites(module):
        if site.parameter is None:
            raise ValueError(
                f"The bypass around this {type(module).__name__} is not inside any weight, so it can't be merged. Keep it as "
                "it is."
            )
        sharing = owners[site.weight.data_ptr() or id(site.weight)]
        if len(sharing) > 1:
            raise ValueError(
                f"The weight of {site.name!r} is shared ({', '.join(sharing)}): merging would change the other layer too. "
                "Keep the adapters unmerged, or leave the shared layer out of targets."
            )
