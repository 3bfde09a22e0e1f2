"""Trains modules and biases in full in addition to adapters, and keeps their original values."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import Tensor, nn

from lora_lightning.lora.adapter import Adapters
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.matching import Names

_log = logging.getLogger("lora_lightning.lora")
_lock = RLock()
_claims: WeakKeyDictionary[nn.Module, ReferenceType[SavedModules]] = WeakKeyDictionary()
"""Maps each module to what trains it in full."""


class SavedModules:
    """Holds the modules that `modules_to_save` selects, and swaps their trained and original values.

    A parameter that is tied to a parameter of another layer is replaced with a copy for training. The other layer stays
    frozen, and restoring the original values restores the tie. Parameters that are tied within these modules stay tied.

    Args:
        module: The adapted module.
        config: Its `modules_to_save` select the modules.
        biases: State-dict keys of biases that are trained in full as well.

    Attributes:
        names: Names of the modules.
        biases: State-dict keys of biases outside these modules.
        keys: State-dict keys of their parameters and buffers.
        is_chosen: Whether the module has the trained values, except during a pause.
    """

    def __init__(self, module: nn.Module, config: LoRAConfig, biases: Iterable[str] = ()) -> None:
        self._module, self._is_in, self.is_chosen = module, True, True
        self._pauses: frozenset[object] = frozenset()
        wanted = Names(config.modules_to_save)
        self.names = [name for name, _ in module.named_modules() if name and wanted.match(name)]
        inside = tuple(f"{name}." for name in self.names)
        self.biases = [key for key in biases if not key.startswith(inside)]
        for name in self.names:
            self._claim(name, module.get_submodule(name).modules())
        for key in self.biases:
            self._claim(key, [module.get_submodule(key.rpartition(".")[0])])
        state = module.state_dict(keep_vars=True)
        adapters = tuple(f"{name}." for name, child in module.named_modules() if isinstance(child, Adapters))
        of_biases = set(self.biases)
        self.keys = [
            key
            for key, value in state.items()
            if isinstance(value, Tensor) and not key.startswith(adapters)
            if key.startswith(inside) or key in of_biases
        ]
        memory = shared_memory(module)
        copies: dict[int, Tensor] = {}
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
            tied = memory.get(id(value), ())
            ties = [name for name in tied if not name.startswith(inside) and name not in of_biases]
            if ties:
                _log.warning("%s is tied to %s, which stays frozen: a separate copy is trained.", key, ", ".join(ties))
                self._tied.add(key)
                self._put(key, copies[id(value)])
                self._others[key] = value

    def _claim(self, name: str, modules: Iterable[nn.Module]) -> None:
        """Refuse modules that is trained in full with the adapters of another root, whose values these would hide."""
        for child in modules:
            other = _claims.get(child)
            saved = None if other is None else other()
            if saved is not None and saved._module is not self._module:
                raise ValueError(
                    f"{name!r} is already trained in full with the adapters of a "
                    f"{type(saved._module).__name__}. Attach the adapters to the same module."
                )
            if saved is None:
                _claims[child] = ref(self)

    @property
    def modules(self) -> list[nn.Module]:
        """Return the modules themselves."""
        return [self._module.get_submodule(name) for name in self.names]

    def train(self) -> None:
        """Train the biases. Freezing the rest trains the modules."""
        for key in self.biases:
            self._live(key).requires_grad_(True)

    def trained_values(self) -> dict[str, Tensor]:
        """Return the trained values by state-dict key, whether or not they are in the module now."""
        return {key: self._live(key) if self._is_in else other for key, other in self._others.items()}

    def choose(self, chosen: bool) -> None:
        """Put the trained values into the module, or the original ones."""
        with _lock:
            self.is_chosen = chosen
            self._update()

    def pause(self, key: object) -> None:
        """Put the original values into the module until `resume` is called with the same key."""
        with _lock:
            self._pauses = self._pauses | {key}
            self._update()

    def resume(self, key: object) -> None:
        """End a pause."""
        with _lock:
            self._pauses = self._pauses - {key}
            self._update()

    def __getstate__(self) -> dict[str, object]:
        if self._pauses:
            raise RuntimeError(
                "Modules that are trained in full have their original values now. Copy or save the module after "
                "disabled(net)."
            )
        return vars(self)

    def _update(self) -> None:
        wanted = self.is_chosen and not self._pauses
        if wanted != self._is_in:
            self._is_in = wanted
            self._swap()

    def _swap(self) -> None:
        exchanged = set()
        for key, other in self._others.items():
            live = self._live(key)
            moved = other
            if (other.device, other.dtype) != (live.device, live.dtype):  # the module was moved or converted meanwhile
                moved = other.detach().to(live.device, live.dtype)
                moved = nn.Parameter(moved, other.requires_grad) if isinstance(other, nn.Parameter) else moved
            if key in self._tied:
                self._put(key, moved)
                self._others[key] = live
            elif id(live) not in exchanged:  # a tied parameter has several keys
                exchanged.add(id(live))
                self._others[key], live.data = live.data, moved.data

    def _live(self, key: str) -> Tensor:
        owner, _, name = key.rpartition(".")
        module = self._module.get_submodule(owner)
        value = module._parameters.get(name, module._buffers.get(name))
        assert value is not None
        return value

    def _put(self, key: str, value: Tensor) -> None:
        owner, _, name = key.rpartition(".")
        module = self._module.get_submodule(owner)
        if name in module._parameters:
            assert isinstance(value, nn.Parameter)
            module._parameters[name] = value
        else:
            module._buffers[name] = value


@contextmanager
def alone(saved: Mapping[str, SavedModules], name: str) -> Iterator[None]:
    """Give the modules that are trained in full the values that go with the adapters of one name, within this context.

    Those that other adapters train have their original values. The adapters themselves stay as they are.
    """
    chosen = {other: values.is_chosen for other, values in saved.items()}
    try:
        choose(saved, {other: other == name for other in chosen})
        yield
    finally:
        choose(saved, chosen)


def choose(saved: Mapping[str, SavedModules], chosen: Mapping[str, bool]) -> None:
    """Put the values of some adapters into the modules that are trained in full, after those of others are out."""
    for name in sorted(chosen, key=chosen.__getitem__):
        saved[name].choose(chosen[name])


def shared_memory(module: nn.Module) -> dict[int, list[str]]:
    """Return, by the `id` of a parameter, the names of all parameters that share its memory, including its own."""
    places: dict[object, list[tuple[str, Tensor, int, int]]] = defaultdict(list)
    for owner_name, owner in module.named_modules():
        for key, value in owner._parameters.items():
            if value is not None:
                places[_storage(value)].append((f"{owner_name}.{key}".lstrip("."), value, *_extent(value)))
    return {
        id(value): [name for name, other, start, stop in found if other is value or (begin < stop and start < end)]
        for found in places.values()
        for _, value, begin, end in found
    }


def _storage(value: Tensor) -> object:
    try:
        return value.untyped_storage().data_ptr() or id(value)
    except (NotImplementedError, RuntimeError, AttributeError):  # a tensor that wraps others, or has no memory
        return id(value)


def _extent(value: Tensor) -> tuple[int, int]:
    """Return the start and end of a tensor in its storage, in bytes."""
    if not value.numel():
        return 0, 0
    begin, length = int(value.storage_offset()), value.numel()
    if not value.is_contiguous():
        length = sum((size - 1) * int(stride) for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
    return begin * value.element_size(), (begin + length) * value.element_size()
