"""Trains modules in full in addition to adapters, and keeps their original values."""

from __future__ import annotations

import logging
from typing import Any, cast

from torch import Tensor, nn

from lora_lightning.lora.config import LoRAConfig, Names
from lora_lightning.lora.merging import shared_memory
from lora_lightning.lora.model import EXTENSIONS

_log = logging.getLogger("lora_lightning.lora")


class SavedModules:
    """Holds the modules that `modules_to_save` selects, and swaps their trained and original values.

    A parameter that is tied to a parameter of another layer is replaced with a copy for training. The other layer stays frozen, and
    restoring the original values restores the tie. Parameters that are tied within these modules stay tied.

    Attributes:
        keys: State-dict keys of the parameters and buffers of these modules.
    """

    def __init__(self, module: nn.Module, config: LoRAConfig) -> None:
        self._module, self._active = module, True
        wanted = Names(config.modules_to_save)
        self.names = [name for name, _ in module.named_modules() if name and wanted(name)]
        state = module.state_dict(keep_vars=True)
        prefixes = tuple(f"{name}." for name in self.names)
        self.keys = [key for key, value in state.items() if key.startswith(prefixes) and isinstance(value, Tensor)]
        memory, copies = shared_memory(module), dict[int, Tensor]()
        self._others: dict[str, Tensor] = {}
        """Values that are not in the module now, by state-dict key."""
        self._tied: set[str] = set()
        for key in self.keys:
            value = state[key]
            if id(value) not in copies:
                copies[id(value)] = value.detach().clone()
                if isinstance(value, nn.Parameter):
                    copies[id(value)] = nn.Parameter(copies[id(value)], requires_grad=False)
            self._others[key] = copies[id(value)]
            ties = [name for name in memory.get(id(value), ()) if not name.startswith(prefixes)]
            if ties:
                _log.warning("%s is tied to %s, which stays frozen: a separate copy is trained.", key, ", ".join(ties))
                self._tied.add(key)
                self._place(key)[key.rpartition(".")[2]] = copies[id(value)]
                self._others[key] = value

    @property
    def modules(self) -> list[nn.Module]:
        """Return the modules themselves."""
        return [self._module.get_submodule(name) for name in self.names]

    @property
    def lora_active(self) -> bool:
        """Return whether the module currently has the trained values."""
        return self._active

    @lora_active.setter
    def lora_active(self, active: bool) -> None:
        if active == self._active:
            return
        self._active = active
        exchanged = set()
        for key, other in self._others.items():
            place, name = self._place(key), key.rpartition(".")[2]
            live = cast(Tensor, place[name])
            moved = other
            if (other.device, other.dtype) != (live.device, live.dtype):  # the module was moved or converted meanwhile
                moved = other.detach().to(live.device, live.dtype)
                moved = nn.Parameter(moved, other.requires_grad) if isinstance(other, nn.Parameter) else moved
            if key in self._tied:
                place[name], self._others[key] = moved, live
            elif id(live) not in exchanged:  # a tied parameter has several keys
                exchanged.add(id(live))
                self._others[key], live.data = live.data, moved.data

    def _place(self, key: str) -> dict[str, Any]:
        owner, _, name = key.rpartition(".")
        module = self._module.get_submodule(owner)
        return module._parameters if name in module._parameters else module._buffers


EXTENSIONS["modules_to_save"] = SavedModules
