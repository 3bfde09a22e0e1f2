"""Records the calls of a model in a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.hooks import RemovableHandle


@dataclass
class Call:
    """Describes a call of a module by the step, not by another recorded module."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any


class RecordedCalls:
    """Records the calls of `forward` of a `LightningModule` and of its children with parameters, until `stop`.

    `forward` is replaced on the module, since many steps call `self.forward(x)`, which no hook observes. With `ddp`, the hooks of the
    module would receive the arguments of the step.

    Args:
        pl_module: The module whose step is about to run.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        self.calls: list[Call] = []
        self._pl_module = pl_module
        self._inside = 0
        self._stopped = False
        self._own_forward = vars(pl_module).get("forward")
        children = [child for child in pl_module.children() if any(True for _ in child.parameters())]
        self._handles: list[RemovableHandle] = [
            child.register_forward_hook(self._record_child, with_kwargs=True) for child in children
        ]
        forward = pl_module.forward

        def recorded(*args: Any, **kwargs: Any) -> Any:
            self._inside += 1
            try:
                output = forward(*args, **kwargs)
            finally:
                self._inside -= 1
            if not self._inside:
                self.calls.append(Call(pl_module, args, kwargs, output))
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

    def _record_child(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._inside:
            self.calls.append(Call(module, args, kwargs, output))
