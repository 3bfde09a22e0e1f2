"""Records what a module was before its first adapters, and answers questions about its adapters.

The layers are the only record of adapters, and each adapter holds its configuration. The module that `attach` was
called with has an `Attachment`: what was trainable before, and the modules that are trained in full.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from torch.utils.hooks import RemovableHandle

from lora_lightning.lora.adapter import Adapters, layers_of
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.layers import Adapted, adapters_of, bare_layers
from lora_lightning.lora.modules_to_save import SavedModules
from lora_lightning.lora.targets import AdaptedWeight
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


def record_of(module: nn.Module) -> Attachment | None:
    """Return the record of `attach` on exactly this module, if any."""
    found = vars(module).get("_lora_attachment")
    return found if isinstance(found, Attachment) else None


def attachment_of(module: nn.Module) -> Attachment:
    """Return the records of `attach` on `module`.

    Raises:
        ValueError: If `attach` was not called with this module.
    """
    module = unwrapped(module)
    found = record_of(module)
    if found is not None:
        return found
    inner = [name for name, child in layers_of(module) if record_of(child) is not None]
    hint = f"Its submodule {inner[0]!r} has adapters: pass that one." if inner else "Call attach(module, config) first."
    raise ValueError(f"This {type(module).__name__} has no adapters of its own. {hint}")


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module without the wrappers of `torch.compile` and Lightning Fabric."""
    inner = module._modules.get("_orig_mod", module._modules.get("_original_module"))
    return module if inner is None else unwrapped(inner)


def is_adapted(module: nn.Module) -> bool:
    """Return whether any layer of `module` has an adapter."""
    return any(isinstance(layer, Adapted) for _, layer in layers_of(module))


def adapted_layers(module: nn.Module) -> list[Adapted]:
    """Return the layers that have adapters."""
    return [layer for _, layer in layers_of(module) if isinstance(layer, Adapted)]


def adapters_in(module: nn.Module) -> list[Adapters]:
    """Return the adapters of each adapted weight."""
    layers = adapted_layers(unwrapped(module))
    return [adapters_of(layer, parameter) for layer in layers for parameter, _ in layer.lora_kinds]


def saved_in(module: nn.Module) -> list[tuple[str, SavedModules]]:
    """Return what is trained in full, with the names of the adapters that it belongs to."""
    records = [record_of(child) for _, child in layers_of(unwrapped(module))]
    return [item for record in records if record is not None for item in record.saved.items()]


def adapted_weights(module: nn.Module, name: str | None = None) -> list[AdaptedWeight]:
    """Return the adapted weights in the order of `module`, with the active adapters, or with those of a given name."""
    found = []
    for layer_name, layer in layers_of(unwrapped(module)):
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


def names_in(module: nn.Module) -> list[str]:
    """Return the names of all adapters, if any. Those that are active come first."""
    containers = adapters_in(module)
    active = [name for adapters in containers for name in adapters.active]
    return list(dict.fromkeys([*active, *(name for adapters in containers for name in adapters.names())]))


def adapter_names(module: nn.Module) -> list[str]:
    """Return the names of all adapters. Those that are active come first.

    Raises:
        ValueError: If `module` has no adapters.
    """
    attachment_of(module)
    return names_in(module)


def active_names(module: nn.Module) -> list[str]:
    """Return the names of the active adapters.

    Raises:
        ValueError: If `module` has no adapters.
    """
    attachment_of(module)
    return list(dict.fromkeys(name for adapters in adapters_in(module) for name in adapters.active))


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
    return list(dict.fromkeys(name for adapters in adapters_in(module) for name in adapters.trained))


def config_of(module: nn.Module, name: str | None = None) -> LoRAConfig:
    """Return the configuration of the adapters with a name, or of the active ones.

    Of several active ones, these are the first that are trained, or else the first.

    Raises:
        ValueError: If there are none.
    """
    attachment_of(module)
    chosen = name or [*trained_names(module), *require_active_names(module)][0]
    require_name(module, chosen)
    return next(adapters.adapter(chosen).config for adapters in adapters_in(module) if chosen in adapters.names())


def require_name(module: nn.Module, name: str) -> None:
    """Check that there are adapters with this name.

    Raises:
        ValueError: If there are none.
    """
    known = names_in(module)
    if name not in known:
        raise ValueError(f"This {type(module).__name__} has no adapters named {name!r}; it has {', '.join(known)}.")


def require_no_context(module: nn.Module, what: str) -> None:
    """Refuse to change a module within the contexts `bare`, `disabled` and `merged`.

    Raises:
        RuntimeError: If it is within one.
    """
    require_no_bare_layers(module)
    if any(adapters.is_paused for adapters in adapters_in(module)):
        raise RuntimeError(f"The adapters are disabled: {what} outside of disabled(net).")
    require_not_merged(module, what)


def require_not_merged(module: nn.Module, what: str) -> None:
    """Refuse to change a module within the context `merged`.

    Raises:
        RuntimeError: If it is within it.
    """
    if any(adapters.is_merged for adapters in adapters_in(module)):
        raise RuntimeError(f"The adapters are merged for a while: {what} outside of merged(net).")


def require_no_bare_layers(module: nn.Module) -> None:
    """Refuse to change a module within the context `bare`.

    Raises:
        RuntimeError: If it is within it.
    """
    names = [name for name, layer in layers_of(module) if layer in bare_layers]
    if names:
        raise RuntimeError(f"The adapters of {some_of(map(repr, names))} are set aside: do this outside of bare(net).")
