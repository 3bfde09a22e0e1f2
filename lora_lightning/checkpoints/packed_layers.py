"""Omits layers of bitsandbytes when saving and loading checkpoints of adapters.

Such a layer can load its weight only in its current form, packed or not, and its state dict has more entries than
parameters.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.utils.hooks import RemovableHandle

from lora_lightning.lora.state import adapter_keys


def packed_keys(module: nn.Module) -> set[str]:
    """Return the state-dict keys of the layers of bitsandbytes in a module, without those of adapters."""
    adapters = adapter_keys(module)
    found = {
        f"{name}.{key}".lstrip(".")
        for name, layer in module.named_modules()
        if any(cls.__module__.startswith("bitsandbytes.") for cls in type(layer).__mro__)
        for key in layer.state_dict()
    }
    return found - adapters


def let_packed_keys_be_missing(module: nn.Module) -> RemovableHandle:
    """Allow `module` to load state dicts without these keys, also strictly, until the handle is removed."""

    def forgive(module: nn.Module, incompatible: _IncompatibleKeys) -> None:
        packed = packed_keys(module)
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in packed]

    return module.register_load_state_dict_post_hook(forgive)  # type: ignore[no-any-return, no-untyped-call]
