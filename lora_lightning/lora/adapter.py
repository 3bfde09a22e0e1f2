"""The verbs: attach and detach adapters, switch them off, fold them in, look at them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.frozen import freeze_statistics, thaw_statistics
from lora_lightning.lora.layers import ADAPTED, LoRALinear


@dataclass(frozen=True)
class Attachment:
    """What `attach` did to a module, kept on that module so that `detach` can undo it."""

    config: LoRAConfig
    names: tuple[str, ...]
    trainable: frozenset[str]
    """Names of the parameters that were trainable before."""


def attach(module: nn.Module, config: LoRAConfig) -> list[str]:
    """Freezes `module` and adapts the matching layers in place.

    Freezing also stops the running statistics of norm layers, whatever mode the module is put in. Either everything
    is attached or, if an error is raised, the module is unchanged.

    Args:
        module: Any module that holds layers, for example a classifier's backbone.
        config: Which layers, and how.

    Returns:
        The dotted names of the adapted layers, in the module's own order.

    Raises:
        ValueError: If `module` is adapted already, a target matches no supported layer, a rank exceeds a layer's
            size, or a layer belongs to a module that would pass its adapter by.

    Example::

        names = attach(backbone, LoRAConfig(rank=1, targets=["linear1"]))
        optimizer = torch.optim.Adam(adapter_parameters(backbone))
    """
    if is_adapted(module):
        raise ValueError(
            f"This {type(module).__name__} has adapters already, on {list(adapted_layers(module))}. "
            "Call detach(module) or merge(module) first."
        )
    layers = _select(module, config)
    trainable = frozenset(name for name, parameter in module.named_parameters() if parameter.requires_grad)
    module.requires_grad_(False)
    freeze_statistics(module)
    for name, layer in layers.items():
        object.__setattr__(layer, "__class__", ADAPTED[type(layer)])
        assert isinstance(layer, LoRALinear)
        layer.adapt(config.rank_of(name), config.scaling_of(name), config.dropout, config.init)
    module._lora_attachment = Attachment(config, tuple(layers), trainable)  # type: ignore[assignment]
    return list(layers)


def detach(module: nn.Module) -> None:
    """Takes the adapters off: the module is bitwise what it was before `attach`, trainability too.

    Raises:
        ValueError: If `module` is not one that `attach` was called with.
    """
    trainable = attachment(module).trainable
    for layer in adapted_layers(module).values():
        del layer.lora_A, layer.lora_B, layer.lora_scaling, layer.lora_dropout, layer.lora_active
        plain = next(plain for plain, adapted in ADAPTED.items() if type(layer) is adapted)
        layer.__class__ = plain  # type: ignore[assignment] # LoRALinear is a subclass of it
    thaw_statistics(module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trainable)
    del module._lora_attachment


@contextmanager
def disabled(module: nn.Module) -> Iterator[None]:
    """Within this context the base model answers; a module without adapters is left alone."""
    layers = list(adapted_layers(module).values())
    before = [layer.lora_active for layer in layers]
    try:
        for layer in layers:
            layer.lora_active = False
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.lora_active = active


@contextmanager
def merged(module: nn.Module) -> Iterator[None]:
    """Within this context the adapters are folded into the weights; afterwards the weights are bitwise as before.

    It costs a copy of the adapted weights, and makes a forward pass as fast as the base's. For inference: parameters
    changed inside the context are lost.

    Raises:
        ValueError: If an adapted weight is shared with another layer, which the merge would change too.
    """
    attachment(module)
    _refuse_shared_weights(module)
    # An adapter that is disabled, or folded already by an outer context, stays out.
    layers = [layer for layer in adapted_layers(module).values() if layer.lora_active]
    saved = [layer.weight.detach().clone() for layer in layers]
    try:
        for layer in layers:
            _fold(layer)
        with disabled(module):
            yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, saved, strict=True):
                layer.weight.copy_(weight)


def merge(module: nn.Module) -> None:
    """Folds the adapters into the weights for good and leaves plain layers, trainable as before `attach`.

    The sum W + s B A is formed in the adapter's precision and rounded once to the weight's.

    Raises:
        ValueError: If `module` is not adapted, or an adapted weight is shared with another layer.
    """
    attachment(module)
    _refuse_shared_weights(module)
    for layer in adapted_layers(module).values():
        _fold(layer)
    detach(module)


def attachment(module: nn.Module) -> Attachment:
    """What `attach` did to this module.

    Raises:
        ValueError: If `attach` was not called with it.
    """
    found = module.__dict__.get("_lora_attachment")
    if isinstance(found, Attachment):
        return found
    inner = [name for name, child in module.named_modules() if "_lora_attachment" in child.__dict__]
    hint = f"Its submodule {inner[0]!r} has: use that one." if inner else "Call attach(module, config) first."
    raise ValueError(f"This {type(module).__name__} has no adapters of its own. {hint}")


def is_adapted(module: nn.Module) -> bool:
    """Whether any layer of the module has an adapter."""
    return any(isinstance(layer, LoRALinear) for layer in module.modules())


def adapted_layers(module: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by dotted name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoRALinear)}


def adapter_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of all adapters, in the module's order: what an optimizer trains."""
    return [parameter for name, parameter in module.named_parameters() if is_adapter_key(name)]


def adapter_state(module: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors by state-dict key (`linear1.lora_A`, ...), detached, sharing memory with the module."""
    return {key: value for key, value in module.state_dict().items() if is_adapter_key(key)}


def is_adapter_key(key: str) -> bool:
    """Whether a parameter name or state-dict key belongs to an adapter and not to its base."""
    return key.rpartition(".")[2].startswith("lora_")


def fingerprint(module: nn.Module) -> str:
    """A digest (SHA-256, hexadecimal) of the base: names, shapes, dtypes and values of its parameters and buffers.

    Adapters do not count, so it is the same before `attach` and after training. Buffers that are not part of the
    state dict do not count either.
    """
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        if is_adapter_key(key) or not isinstance(value, Tensor):
            continue
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _select(module: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The layers to adapt, by name; every complaint about them is made here, before anything is changed."""
    modules = dict(module.named_modules())
    supported = {name: layer for name, layer in modules.items() if type(layer) in ADAPTED}
    unmatched = config.unmatched_targets(supported)
    selected = {name: layer for name, layer in supported.items() if config.selects(name)}
    if unmatched or not selected:
        raise ValueError(_no_match(modules, supported, unmatched))
    for name, layer in selected.items():
        parent = modules[name.rpartition(".")[0]] if name else None
        if isinstance(parent, nn.TransformerEncoderLayer):
            raise ValueError(
                f"Layer {name!r} can't be adapted: in evaluation nn.TransformerEncoderLayer reads its weight and never "
                f"calls it, so its adapter would be ignored. Leave it out with exclude=[{name!r}]."
            )
        weight = layer._parameters.get("weight")
        if weight is None:
            raise ValueError(
                f"Layer {name!r} computes its weight from other parameters (as pruning and weight normalisation do): make "
                f"that permanent first, or leave it out with exclude=[{name!r}]."
            )
        if not weight.is_floating_point():
            raise ValueError(
                f"Layer {name!r} has a weight of {weight.dtype}; only floating-point layers can be adapted."
            )
        rank, limit = config.rank_of(name), min(weight.shape)
        if rank > limit:
            raise ValueError(
                f"rank={rank} exceeds layer {name!r}, whose weight of shape {tuple(weight.shape)} has rank {limit} at "
                f"most. Choose a smaller rank, or one for this layer with rank_pattern={{{name!r}: {limit}}}."
            )
    return selected


def _no_match(modules: dict[str, nn.Module], supported: dict[str, nn.Module], unmatched: list[str]) -> str:
    """The message for targets that select nothing."""
    kinds = ", ".join(f"nn.{kind.__name__}" for kind in ADAPTED)
    names = ", ".join(supported) if supported else "none"
    unsupported = [
        f"{target!r} is a {type(layer).__name__}"
        for target in unmatched
        for name, layer in modules.items()
        if name and (name == target or name.endswith(f".{target}"))
    ]
    what = f"Targets {unmatched} match no layer" if unmatched else "No layer is left to adapt"
    why = f" ({'; '.join(unsupported)})" if unsupported else ""
    return f"{what} of a supported kind ({kinds}){why}. Layers that can be adapted: {names}."


def _fold(layer: LoRALinear) -> None:
    with torch.no_grad():
        weight = layer.weight
        weight.copy_(weight.to(layer.lora_A.dtype) + layer.delta())


def _refuse_shared_weights(module: nn.Module) -> None:
    """A merge writes into W; a second layer that holds the same W would be changed without being asked."""
    owners: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), []).append(name)
    for name, layer in adapted_layers(module).items():
        sharing = owners[layer.weight.data_ptr()]
        if len(sharing) > 1:
            raise ValueError(
                f"The weight of {name!r} is shared ({', '.join(sharing)}): merging would change the other layer too. "
                "Keep the adapters unmerged, or leave the shared layer out of targets."
            )
