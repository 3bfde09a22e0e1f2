"""Records the calls of a model in a step, with copies of their arguments."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass
class Call:
    """Describes a call of a module by the step, not by another recorded module.

    Args:
        module: The module.
        args: Its arguments as they were before the call, since a `forward` may change them in place.
        kwargs: Its keyword arguments before the call.
        output: What it returned.
        random_state: The random state of each device before the call, or `None` if the call is not to be repeated.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    random_state: RandomStates | None = None

    def again(self) -> Any:
        """Return the output of the same call now, with the random numbers that it had. The run keeps its own."""
        if self.random_state is None:
            return self.module(*self.args, **self.kwargs)
        with self.random_state.restored():
            return self.module(*self.args, **self.kwargs)


class RandomStates:
    """Holds PyTorch's random state on the CPU and on the device of a tensor among the arguments."""

    def __init__(self, devices: list[int]) -> None:
        self._devices = devices
        self._states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Return to this state within the context, and to the present one after it."""
        present = RandomStates(self._devices)
        self._restore()
        try:
            yield
        finally:
            present._restore()

    def _restore(self) -> None:
        torch.set_rng_state(self._states[0])
        for device, state in zip(self._devices, self._states[1], strict=True):
            torch.cuda.set_rng_state(state, device)


class RecordedCalls:
    """Records the calls of `forward` of a `LightningModule` and of its children with parameters, until `stop`.

    `forward` is replaced on the module, since many steps call `self.forward(x)`, which no hook observes. With `ddp`,
    the hooks of the module would receive the arguments of the step.

    Args:
        pl_module: The module whose step is about to run.
        for_repetition: Whether the calls are to be repeated. Then their arguments are copied.
    """

    def __init__(self, pl_module: LightningModule, for_repetition: bool = True) -> None:
        self.calls: list[Call] = []
        self._pl_module = pl_module
        self._for_repetition = for_repetition
        self._inside = 0
        self._stopped = False
        self._before: dict[nn.Module, list[Call]] = {}
        self._own_forward = vars(pl_module).get("forward")
        children = [child for child in pl_module.children() if any(True for _ in child.parameters())]
        self._handles: list[RemovableHandle] = []
        for child in children:
            self._handles.append(child.register_forward_pre_hook(self._start_child, with_kwargs=True))
            self._handles.append(child.register_forward_hook(self._end_child))
        forward = pl_module.forward

        def recorded(*args: Any, **kwargs: Any) -> Any:
            call = self._started(pl_module, args, kwargs) if not self._inside else None
            self._inside += 1
            try:
                output = forward(*args, **kwargs)
            finally:
                self._inside -= 1
            if call is not None:
                call.output = output
                self.calls.append(call)
            return output

        pl_module.forward = recorded  # type: ignore[method-assign]

    def stop(self) -> list[Call]:
        """Restore the module and return its calls in order."""
        if not self._stopped:
            self._stopped = True
            for handle in self._handles:
                handle.remove()
            del self._pl_module.forward
            if self._own_forward is not None:
                self._pl_module.forward = self._own_forward  # type: ignore[method-assign]
        return self.calls

    def _started(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        if not self._for_repetition:
            return Call(module, args, kwargs, None)
        copies: dict[int, Any] = {}
        try:
            kept_args, kept_kwargs = snapshot(args, copies), snapshot(dict(kwargs), copies)
        except Exception:  # noqa: BLE001 - arguments that can not be copied must not cost the run
            kept_args, kept_kwargs = args, dict(kwargs)
        tensors = [each for each in copies.values() if isinstance(each, Tensor)]
        devices = sorted({each.device.index for each in tensors if each.device.type == "cuda"})
        return Call(module, kept_args, kept_kwargs, None, RandomStates(devices))

    def _start_child(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._inside:
            self._before.setdefault(module, []).append(self._started(module, args, kwargs))

    def _end_child(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._inside and self._before.get(module):
            call = self._before[module].pop()
            call.output = output
            self.calls.append(call)


def snapshot(value: Any, copies: dict[int, Any] | None = None) -> Any:
    """Return a copy of arguments that code may change in place: of tensors, containers and objects that hold them.

    Modules, and objects that cannot be copied, are returned as they are.

    Args:
        value: The arguments.
        copies: The copies by the identity of the original, so that a tensor that occurs twice is copied once.
    """
    copies = {} if copies is None else copies
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, nn.Module | str | bytes | int | float | bool | type) or value is None or callable(value):
        return value
    if isinstance(value, Tensor):
        found: Any = value.clone()  # not a deep copy, which would copy all of the memory that a view is part of
    elif isinstance(value, tuple):
        parts = [snapshot(each, copies) for each in value]
        found = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    elif isinstance(value, list):
        found = [snapshot(each, copies) for each in value]
    elif isinstance(value, dict):
        found = copy.copy(value)
        for key in found:
            found[key] = snapshot(value[key], copies)
    else:
        found = _copied_object(value, copies)
    copies[id(value)] = found
    return found


def _copied_object(value: Any, copies: dict[int, Any]) -> Any:
    try:
        if callable(clone := getattr(value, "clone", None)):  # a batch of PyTorch Geometric
            return clone()
        found = copy.copy(value)
        for name, each in list(vars(found).items()):
            setattr(found, name, snapshot(each, copies))
    except Exception:  # noqa: BLE001 - an object of another library, which must not cost the run
        return value
    return found
