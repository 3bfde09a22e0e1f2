"""Finds the frozen prefix of a network: the part before anything that is trained, whose output for a sample never changes.

The network runs once with hooks on all of its modules. The prefix consists of the outermost modules that returned before the first output that
requires a gradient, the first random number, and the first change of a buffer. Only outputs that the rest of the network uses have to be
stored. To find them, outputs are replaced with NaN, and the output of the network is compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

Forward = Callable[..., Any]


class NotCacheableError(ValueError):
    """Raised if features cannot be stored, with the reason."""


@dataclass(eq=False)
class Step:
    """Describes one call of a module in the prefix."""

    name: str
    module: nn.Module
    occurrence: int
    """Number of earlier calls of the module in the forward pass."""
    output: Any
    """Output of the module when the prefix was found."""
    kept: bool = True
    """Whether the rest of the network uses its output."""


@dataclass
class Prefix:
    """Holds the calls of the prefix in order, and what follows them."""

    steps: list[Step]
    ended_by: str

    @property
    def kept(self) -> list[Step]:
        """Return the calls whose outputs are stored."""
        return [step for step in self.steps if step.kept]


def find_prefix(module: nn.Module, call: Callable[[], Any], samples: int) -> Prefix:
    """Find the prefix of `module`.

    Args:
        module: An adapted module in training mode.
        call: Calls the module with a batch. The random state and the buffers are restored afterwards.
        samples: Number of samples in the batch. Modules with another first dimension in their output are excluded.

    Raises:
        NotCacheableError: If there is no prefix with parameters. The message names the first operation that prevents it.
    """
    with same_random_numbers():
        trace = _Trace(module)
        expected = trace.run(call)
    ended_by = trace.ended_by or "the end of the network"
    steps = [step for step in trace.steps if all(_counts(leaf, samples) for leaf in tree_leaves(step.output))]
    computes = any(True for step in steps for _ in step.module.parameters())
    if not computes or not _is_enough(steps, call, expected):
        raise NotCacheableError(
            f"{type(module).__name__} has no frozen prefix before {ended_by}. Adapt later layers only."
        )
    for step in steps:
        if all(leaf.is_floating_point() for leaf in tree_leaves(step.output)):  # integers cannot be replaced with NaN
            step.kept = False
            step.kept = not _is_enough(steps, call, expected)
    if not _gradients_are_finite(module, steps, call):
        raise NotCacheableError(
            f"the backward pass of {type(module).__name__} computes its frozen prefix again, as activation checkpointing does."
        )
    return Prefix(steps, ended_by)


@contextmanager
def replaced(steps: list[Step], answer: Callable[[Step, Forward], Any]) -> Iterator[None]:
    """Replace the output of each step with `answer(step, forward)` in this context.

    `forward()` computes the original output of the module.
    """
    calls: dict[nn.Module, int] = {}
    by_module: dict[nn.Module, dict[int, Step]] = {}
    for step in steps:
        by_module.setdefault(step.module, {})[step.occurrence] = step

    def forward(module: nn.Module, original: Forward, *args: Any, **kwargs: Any) -> Any:
        occurrence = calls.get(module, 0)
        calls[module] = occurrence + 1
        step = by_module[module].get(occurrence)
        run = partial(original, *args, **kwargs)
        return run() if step is None else answer(step, run)

    originals = {module: vars(module).get("forward") for module in by_module}
    for module in by_module:
        module.forward = partial(forward, module, module.forward)
    try:
        yield
    finally:
        for module, original in originals.items():
            if original is None:
                del module.forward
            else:
                module.forward = original


def placeholders(output: Any) -> Any:
    """Return placeholders for an output that must not be used, given as `Like`s."""
    return tree_map_only(Like, Like.placeholder, output)


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Restore the state of the random number generators at the end of this context."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if _uses_cuda() else []):
            yield
    finally:
        random.setstate(state)


@contextmanager
def same_buffers(module: nn.Module) -> Iterator[None]:
    """Restore the buffers of the module at the end of this context."""
    before = [
        (part, name, buffer, buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for part, name, buffer, value in before:
            part._buffers[name] = buffer
            if not torch.equal(
                buffer, value
            ):  # batch norm does not count the writes to its statistics in their version
                with torch.no_grad():
                    buffer.copy_(value)


def copied(output: Any) -> Any:
    """Return a copy of an output."""
    return tree_map_only(Tensor, lambda value: value.detach().clone(), output)


def equal(first: Any, second: Any) -> bool:
    """Return whether two outputs are bitwise equal."""
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@dataclass(frozen=True)
class Like:
    """Describes a tensor without its values."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Like:
        """Return the description of a tensor."""
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    def empty(self) -> Tensor:
        """Return an uninitialized tensor with the same memory layout, which affects kernels."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)

    def placeholder(self) -> Tensor:
        """Return a tensor whose use changes the output: NaN, or zero for dtypes without NaN."""
        return self.empty().fill_(float("nan") if self.dtype.is_floating_point else 0)


@dataclass
class _Entered:
    """Holds a module that was called and is still running."""

    steps_before: int
    versions: list[int]


@dataclass
class _Trace:
    root: nn.Module
    steps: list[Step] = field(default_factory=list)
    ended_by: str = ""

    def run(self, call: Callable[[], Any]) -> Any:
        """Call the module with hooks on all submodules and return a copy of the output."""
        self._names = {module: name for name, module in self.root.named_modules() if name}
        self._calls: dict[nn.Module, int] = {}
        self._entered: list[_Entered] = []
        self._random_state = _random_state()
        hooks = []
        for module in self._names:
            hooks.append(module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True))
            hooks.append(module.register_forward_hook(self._leave, prepend=True))
        try:
            with torch.enable_grad():
                return copied(call())
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._look(f"what is computed before {self._names[module]!r}", (args, kwargs))
        self._entered.append(_Entered(len(self.steps), _versions(module)))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        entered, name = self._entered.pop(), self._names[module]
        occurrence = self._calls.get(module, 0)
        self._calls[module] = occurrence + 1
        self._look(repr(name), output)
        if not self.ended_by and entered.versions != _versions(module):
            self.ended_by = f"{name!r}, which changes its buffers"
        if not self.ended_by:
            self.steps[entered.steps_before :] = [Step(name, module, occurrence, copied(output))]

    def _look(self, name: str, values: Any) -> None:
        if self.ended_by:
            return
        if any(isinstance(value, Tensor) and value.requires_grad for value in tree_leaves(values)):
            self.ended_by = f"{name}, which trains"
        elif _random_state() != self._random_state:
            self.ended_by = f"{name}, which draws random numbers"


def _is_enough(steps: list[Step], call: Callable[[], Any], expected: Any) -> bool:
    """Return whether the stored outputs alone reproduce the output of the network."""
    with same_random_numbers(), torch.no_grad(), replaced(steps, _found_answer):
        try:
            return equal(call(), expected)
        except Exception:  # noqa: BLE001 - whatever a network raises that is given NaN
            return False


def _gradients_are_finite(module: nn.Module, steps: list[Step], call: Callable[[], Any]) -> bool:
    with same_random_numbers():
        with torch.enable_grad(), replaced(steps, _found_answer):
            outputs = [leaf for leaf in tree_leaves(call()) if isinstance(leaf, Tensor) and leaf.requires_grad]
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not outputs or not trained:
            return True
        gradients = torch.autograd.grad([output.sum() for output in outputs], trained, allow_unused=True)
    return all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)


def _found_answer(step: Step, forward: Forward) -> Any:
    return copied(step.output) if step.kept else placeholders(tree_map_only(Tensor, Like.of, step.output))


def _counts(leaf: Any, samples: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == samples


def _versions(module: nn.Module) -> list[int]:
    return [buffer._version for buffer in module.buffers()]


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _random_state() -> list[Any]:
    devices = [torch.cuda.get_rng_state().tolist()] if _uses_cuda() else []
    return [torch.get_rng_state().numpy().tobytes(), random.getstate(), *devices]
