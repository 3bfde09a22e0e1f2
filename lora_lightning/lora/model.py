"""Attaches adapters to a module and detaches them."""

import difflib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_lightning.lora.config import LoRAConfig, Names
from lora_lightning.lora.freeze import FrozenStatistics, freeze, unfreeze_statistics
from lora_lightning.lora.layers import LAYERS, LoRALayer, compose, dense, mixins_of
from lora_lightning.wording import some_of

# Implementations of `name`, `bypass`, `modules_to_save` and the exclusions of "all", registered by other files.
EXTENSIONS: dict[str, Callable[..., Any]] = {}


@dataclass
class AdaptedWeight:
    """Describes a weight that is or can be adapted. If a layer has several, the name of the parameter follows that of the layer."""

    layer_name: str
    layer: nn.Module
    parameter: str
    kind: type[LoRALayer]
    rank: int = 0

    key = property(lambda self: f"{self.layer_name}.{self.parameter}".strip("."))
    name = property(lambda self: self.key if self.kind.lora_is_inside else self.layer_name)
    names = property(lambda self: (self.name, self.layer_name))
    adapter = property(lambda self: self.layer._modules.get(f"lora_{self.parameter}", self.layer))
    shape = property(lambda self: self.kind.lora_shape(self.layer, self.weight))
    factors = property(lambda self: [self.adapter.get_parameter(name) for name in self.adapter.lora_names])
    weight = property(lambda self: self.layer._parameters.get(self.parameter))


@dataclass
class Attachment:
    """Records the changes that `attach` made to a module."""

    config: LoRAConfig
    name: str
    was_trainable: frozenset[str]
    saved: Any = None  # the modules trained in full: `lora_active` swaps trained and original values
    others: dict[str, Any] = field(default_factory=dict)  # the inactive adapters by name


def attach(module: nn.Module, config: LoRAConfig, name: str = "default") -> list[str]:
    """Freeze `module`, adapt the matching layers in place, and return their dotted names (`""` for `module` itself).

    Args:
        module: Any module, for example the backbone of a classifier.
        config: Selects the layers and configures the adapters.
        name: Name of these adapters. Adapters with other names become inactive until `set_adapter`.

    Raises:
        ValueError: If the name exists, a pattern matches nothing, or a layer cannot be adapted. `module` is then unchanged.
    """
    module = unwrapped(module)
    if is_adapted(module):
        return cast(list[str], EXTENSIONS["name"](module, config, name))
    trainable = frozenset(key for key, value in module.named_parameters() if value.requires_grad)
    return adapt(module, select(module, config), Attachment(config, name, trainable))


def adapt(module: nn.Module, selected: list[AdaptedWeight], attachment: Attachment) -> list[str]:
    """Freeze a module without adapters, adapt the selected weights, and return their names."""
    config = attachment.config
    attachment.saved = EXTENSIONS["modules_to_save"](module, config) if config.modules_to_save else None
    module._lora_attachment = attachment  # type: ignore[assignment]
    try:
        freeze(module, attachment.saved.modules if attachment.saved else ())
        for each in selected:
            adapter = each.kind.lora_place(each.layer, each.parameter, config.variants)
            adapter.lora_create(each.weight, each.rank, config.scaling_of(*each.names, rank=each.rank), config)
    except BaseException:
        detach(module)
        raise
    return [each.name for each in adapted_weights(module)]


def candidates(module: nn.Module, config: LoRAConfig) -> dict[str, AdaptedWeight]:
    """Return the weights that can be adapted by name: those of supported layers and those of `target_parameters`."""
    found, by_name = dict[str, AdaptedWeight](), Names(config.target_parameters)
    for name, layer in module.named_modules():
        parameters = [key for key, _ in layer.named_parameters(recurse=False)]
        kind, wanted = kind_of(layer), [key for key in parameters if by_name(f"{name}.{key}".lstrip("."))]
        if wanted and not kind.lora_is_inside:
            kind = LAYERS[nn.Module]
        for key, own in (kind.lora_find(layer, wanted) if wanted or kind is not LAYERS[nn.Module] else {}).items():
            each = AdaptedWeight(name, layer, key, own)
            each.rank, found[each.name] = config.rank_of(*each.names), each
    return found


def kind_of(layer: nn.Module) -> type[LoRALayer]:
    """Return the adapter class for `layer`, which depends on whether its methods are those of the supported class."""
    keys = ((cls, key) for cls in type(layer).__mro__ for key in (cls, (cls.__module__.split(".")[0], cls.__name__)))
    cls, kind = next((cls, LAYERS[key]) for cls, key in keys if key in LAYERS)
    names = ("forward", "_conv_forward", "_save_to_state_dict")
    same = all(getattr(type(layer), name, None) is getattr(cls, name, None) for name in names)
    if kind.lora_is_inside or (same and "forward" not in layer.__dict__):
        return kind
    return cast(type[LoRALayer], EXTENSIONS["own forward"](layer))


def select(module: nn.Module, config: LoRAConfig) -> list[AdaptedWeight]:
    """Return the weights that `config` selects, or raise a `ValueError` that names all weights that cannot be adapted."""
    known, modules = candidates(module, config), {name: child for name, child in module.named_modules() if name}
    by_name, saved = Names(config.target_parameters), Names(config.modules_to_save)
    inside = {layer for name, child in modules.items() if saved(name) for layer in child.modules()}
    hosts = [child for child in module.modules() if hasattr(child, "get_output_embeddings")]
    left_out = EXTENSIONS["all"](hosts, known, config) if hosts and config.target_modules == "all" else ()
    wanted = [each for each in known.values() if config.selects(*each.names) or by_name(each.name)]
    selected = [each for each in wanted if each.layer not in inside and each.name not in left_out]
    selected += EXTENSIONS["bypass"](module, config) if config.bypass else []
    targets = [] if config.target_modules == "all" else config.target_modules
    missing = Names(targets).unmatched(name for each in known.values() for name in each.names)
    missing += by_name.unmatched(known) + saved.unmatched(modules)
    for patterns in (config.rank_pattern, config.alpha_pattern):
        missing += Names(patterns).unmatched(name for each in selected for name in each.names)
    if missing or not selected:
        close = [name for key in missing for name in difflib.get_close_matches(key, known)]
        what = f"Targets {missing} match no layer of a supported kind" if missing else "No layer is left to adapt"
        listed = some_of(dict.fromkeys([*close, *known] if len(known) > 20 else known), 20) or "none"
        raise ValueError(f"{what}. Layers that can be adapted: {listed}. For others, set target_parameters.")
    refused = [f"Layer {each.name!r} {why}" for each in selected if (why := _refusal(each, config))]
    if refused:
        raise ValueError(f"{some_of(refused)}. Leave such layers out with exclude_modules.")
    if lowered := [each for each in selected if each.rank > min(each.shape)]:
        listed = some_of(f"{each.name or 'root'!r} has {min(each.shape)} instead of {each.rank}" for each in lowered)
        logging.getLogger("lora_lightning.lora").warning("Ranks are limited by the size of the layers: %s.", listed)
    for each in lowered:
        each.rank = min(each.shape)
    return selected


def _refusal(each: AdaptedWeight, config: LoRAConfig) -> str | None:
    weight = each.weight
    if weight is None:
        return "computes its weight from other parameters (as pruning and weight normalization do): make this permanent first"
    if is_lazy(weight):
        return "has no weight yet: run a batch through the model first"
    if not each.kind.lora_is_packed and (not weight.is_floating_point() or dense(weight).itemsize < 2):
        return f"has a weight of {weight.dtype}: expected float16 or above, or one quantized by torchao or bitsandbytes"
    if weight.dim() < 2:
        return f"is of shape {tuple(weight.shape)}: expected two or more dimensions"
    reasons = (cls.lora_refusal(each.layer, weight, config) for cls in (*config.variants, each.kind))
    return next(filter(None, reasons), None)


def detach(module: nn.Module) -> None:
    """Remove the adapters and restore `module` bitwise, including `requires_grad`. It has to be the module that `attach` was called with."""
    module = unwrapped(module)
    if saved := attachment_of(module).saved:
        saved.lora_active = False
    leave_plain(module)


def leave_plain(module: nn.Module) -> None:
    """Remove the adapters and the records of `attach`. Modules that were trained in full keep their values."""
    remove_adapters(module)
    unfreeze_statistics(module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in attachment_of(module).was_trainable)
    del module._lora_attachment


def remove_adapters(module: nn.Module) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Remove the adapters and return, for each layer, its name, the mixins of its class, and its adapter tensors."""
    removed: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    for name, layer in {each.layer_name: each.layer for each in adapted_weights(module)}.items():
        places = (layer._parameters, layer._buffers, layer._modules, layer.__dict__)
        held = {key: place.pop(key) for place in places for key in list(place) if key.startswith("lora_")}
        removed.append((name, mixins_of(layer), held))
        compose(layer, *(mixin for mixin in mixins_of(layer) if mixin is FrozenStatistics))
    return removed


def is_adapted(module: nn.Module) -> bool:
    """Return whether any layer of `module` has an adapter."""
    return any(isinstance(layer, LoRALayer) for layer in module.modules())


def adapted_weights(module: nn.Module) -> list[AdaptedWeight]:
    """Return the adapted weights, in the order of `module`."""
    modules, found = dict(unwrapped(module).named_modules()), []
    for name, adapter in modules.items():
        if isinstance(adapter, LoRALayer):
            layer_name, _, last = name.rpartition(".") if adapter.lora_is_inside else (name, "", adapter.lora_parameter)
            layer, parameter = modules[layer_name], last.removeprefix("lora_")
            rank = len(cast(Tensor, adapter._parameters.get(adapter.lora_names[0], ())))
            found.append(AdaptedWeight(layer_name, layer, parameter, type(adapter), rank))
    return found


def attachment_of(module: nn.Module) -> Attachment:
    """Return the records of `attach` on `module`, or raise a `ValueError` if there are none."""
    module = unwrapped(module)
    if isinstance(found := vars(module).get("_lora_attachment"), Attachment):
        return found
    inner = [name for name, child in module.named_modules() if "_lora_attachment" in vars(child)]
    hint = f"Its submodule {inner[0]!r} has adapters: pass that one." if inner else "Call attach(module, config) first."
    raise ValueError(f"This {type(module).__name__} has no adapters of its own. {hint}")


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module without the wrappers of `torch.compile` and Lightning Fabric."""
    inner = module._modules.get("_orig_mod", module._modules.get("_original_module"))
    return module if inner is None else unwrapped(inner)
