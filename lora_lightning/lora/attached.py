"""What is attached to a module: where its adapters sit, and how they are taken off and put on again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lora_lightning.lora.bypass import LoRABypass
from lora_lightning.lora.config import LoRAConfig, matches
from lora_lightning.lora.effective import plain_class
from lora_lightning.lora.frozen import freeze_statistics, thaw_statistics
from lora_lightning.lora.update import LowRankUpdate, ParameterUpdate


@dataclass
class Site:
    """An adapter and what it adapts."""

    name: str
    """The layer's dotted name; with the parameter's name after it if the layer reads that parameter itself."""
    layer_name: str
    layer: nn.Module
    parameter: str | None
    """`None` for a bypass, which adapts no parameter."""
    update: LowRankUpdate

    @property
    def weight(self) -> nn.Parameter:
        """The frozen weight that is adapted."""
        assert self.parameter is not None
        weight = self.layer._parameters[self.parameter]
        assert weight is not None
        return weight

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        assert self.parameter is not None
        self.layer._parameters[self.parameter] = value


@dataclass(frozen=True)
class Part:
    """An adapter that has been taken off."""

    layer_name: str
    parameter: str | None
    layer_class: type[nn.Module]
    """The adapted class that the layer had."""
    content: dict[str, Any]


@dataclass
class Shelved:
    """A named adapter that is loaded but not in use: its parts, and the modules trained whole with it."""

    config: LoRAConfig
    parts: list[Part]
    whole: dict[str, Tensor]


@dataclass
class Attachment:
    """What `attach` did to a module, kept on that module so that `detach` can undo it."""

    config: LoRAConfig
    name: str
    """Of the adapter in use."""
    was_trainable: frozenset[str]
    """Names of the parameters that were trainable before."""
    originals: dict[str, Tensor]
    """What the modules that are trained whole were before, by state-dict key."""
    shelf: dict[str, Shelved] = field(default_factory=dict)


def attachment(module: nn.Module) -> Attachment:
    """What `attach` did to this module.

    Raises:
        ValueError: If `attach` was not called with it.
    """
    found = module.__dict__.get("_lora_attachment")
    if isinstance(found, Attachment):
        return found
    inner = list(attachments(module))
    hint = f"Its submodule {inner[0]!r} has: use that one." if inner else "Call attach(module, config) first."
    raise ValueError(f"This {type(module).__name__} has no adapters of its own. {hint}")


def adapter_names(module: nn.Module) -> list[str]:
    """The names of all adapters that are loaded; the first is the one in use."""
    attached = attachment(module)
    return [attached.name, *attached.shelf]


def set_aside(module: nn.Module) -> dict[str, Shelved]:
    """Takes the adapters in use off, and returns them together with those set aside before, by name."""
    attached = attachment(module)
    trained = exchange(module, attached.originals)
    return {**attached.shelf, attached.name: Shelved(attached.config, take_off(module), trained)}


def attachments(module: nn.Module) -> dict[str, Attachment]:
    """What `attach` did to this module and to those inside it, by dotted name."""
    return {
        name: child.__dict__["_lora_attachment"]
        for name, child in module.named_modules()
        if "_lora_attachment" in child.__dict__
    }


def sites(module: nn.Module) -> list[Site]:
    """All adapters in the module, in its own order."""
    modules = dict(module.named_modules())
    found: list[Site] = []
    for name, child in modules.items():
        if isinstance(child, ParameterUpdate):
            layer_name, _, key = name.rpartition(".")
            parameter = key.removeprefix("lora_")
            full_name = f"{layer_name}.{parameter}".lstrip(".")
            found.append(Site(full_name, layer_name, modules[layer_name], parameter, child))
        elif isinstance(child, LowRankUpdate):
            found.append(Site(name, name, child, None if isinstance(child, LoRABypass) else "weight", child))
    return found


def whole_keys(module: nn.Module) -> set[str]:
    """State-dict keys of the modules that are trained whole beside adapters."""
    return {f"{name}.{key}".lstrip(".") for name, attached in attachments(module).items() for key in attached.originals}


def modules_to_train(module: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules that the configuration wants trained whole, by name."""
    return {name: child for name, child in module.named_modules() if name and matches(config.trainable, name)}


def freeze_base(module: nn.Module) -> None:
    """Freezes a module that `attach` was called with, but for the modules trained whole; no adapter may be on."""
    attached = attachment(module)
    whole = modules_to_train(module, attached.config)
    module.requires_grad_(False)
    thaw_statistics(module)
    freeze_statistics(module, but=whole.values())
    for child in whole.values():
        for parameter in child.parameters():
            parameter.requires_grad_(parameter.is_floating_point())


def take_off(module: nn.Module) -> list[Part]:
    """Takes all adapters off: every layer is of its own class again."""
    found = sites(module)
    parts = [Part(site.layer_name, site.parameter, type(site.layer), site.update.lora_take_off()) for site in found]
    for site in found:
        site.layer._modules.pop(f"lora_{site.parameter}", None)
    for layer in {site.layer_name: site.layer for site in found}.values():
        change_class(layer, plain_class(type(layer)))
        if isinstance(layer, nn.RNNBase):
            layer._init_flat_weights()
    return parts


def put_on(module: nn.Module, parts: Iterable[Part]) -> None:
    """Puts on what `take_off` returned."""
    modules = dict(module.named_modules())
    for part in parts:
        layer = modules[part.layer_name]
        change_class(layer, part.layer_class)
        update = holder(layer, part.parameter)
        update.lora_put_on(part.content, next(module.parameters()).device)


@contextmanager
def bare(module: nn.Module) -> Iterator[None]:
    """Within this context the module has no adapters, for a look at its own layers."""
    parts = take_off(module)
    try:
        yield
    finally:
        put_on(module, parts)


def holder(layer: nn.Module, parameter: str | None) -> LowRankUpdate:
    """What holds the adapter: the layer, if it is a side path, or else a module made for the parameter."""
    if parameter is None or (parameter == "weight" and isinstance(layer, LowRankUpdate)):
        assert isinstance(layer, LowRankUpdate)
        return layer
    update = layer._modules.get(f"lora_{parameter}")
    if update is None:
        update = ParameterUpdate()
        update.train(layer.training)
        layer.add_module(f"lora_{parameter}", update)
    assert isinstance(update, LowRankUpdate)
    return update


def change_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Swaps a layer's class in place."""
    object.__setattr__(layer, "__class__", cls)


def exchange(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Puts parameters and buffers in the place of others, by state-dict key, and returns those."""
    modules, previous = dict(module.named_modules()), {}
    for key, tensor in tensors.items():
        owner, _, name = key.rpartition(".")
        place = modules[owner]._parameters if name in modules[owner]._parameters else modules[owner]._buffers
        old = place[name]
        assert old is not None
        previous[key] = old
        place[name] = tensor if tensor.device == old.device else _moved(tensor, old)
    return previous


def _moved(tensor: Tensor, beside: Tensor) -> Tensor:
    moved = tensor.detach().to(beside.device)
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
