"""Saves and loads checkpoints of adapters for a strategy that does not use its CheckpointIO."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lora_lightning.lora import is_adapted
from lora_lightning.resume.adapter_checkpoint import AdapterContent
from lora_lightning.resume.checkpoints import ADAPTER_KEY


class ShardedCheckpoints:
    """Omits the frozen base from the checkpoints that `ModelParallelStrategy` saves and loads.

    This strategy gathers or shards the state of the model itself, so three of its methods are replaced on the object. The base is not in
    the state dict of the model while they run: it is neither gathered on one process nor expected when loading. After the adapters are
    merged or detached, or if the trainer has another model, checkpoints are passed on unchanged.

    Args:
        strategy: The strategy.
        content: The content of a checkpoint of the adapted model.
    """

    def __init__(self, strategy: ModelParallelStrategy, content: AdapterContent) -> None:
        self.strategy = strategy
        self.content = content
        for name in ("lightning_module_state_dict", "save_checkpoint", "load_checkpoint"):
            vars(strategy).pop(name, None)  # replaced for an earlier run
        self._state, self._save, self._load = (
            strategy.lightning_module_state_dict,
            strategy.save_checkpoint,
            strategy.load_checkpoint,
        )
        strategy.lightning_module_state_dict = self.state_dict  # type: ignore[method-assign]
        strategy.save_checkpoint = self.save_checkpoint  # type: ignore[method-assign]
        strategy.load_checkpoint = self.load_checkpoint  # type: ignore[method-assign]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the model without the base."""
        with self._without_base():
            return self._state()

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint with a description of the adapters."""
        if self._applies():
            checkpoint[ADAPTER_KEY] = self.content.description()
        self._save(checkpoint, *args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint into the model and check that it belongs to the base and the adapters.

        Raises:
            ValueError: For the reasons of `AdapterContent.check`.
        """
        module = self.content.pl_module
        strict = module._strict_loading
        if self._applies():
            module.strict_loading = False  # the description is compared instead
        try:
            with self._without_base():
                checkpoint = self._load(*args, **kwargs)
        finally:
            module._strict_loading = strict
        if self._applies():
            self.content.check("The checkpoint", checkpoint.get(ADAPTER_KEY))
        return checkpoint

    def _applies(self) -> bool:
        return is_adapted(self.content.adapted) and self.strategy.lightning_module is self.content.pl_module

    @contextmanager
    def _without_base(self) -> Iterator[None]:
        """Omit the base from the state dict of the model within this context."""
        omitted = self.content.base_keys() if self._applies() else set()

        def omit(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
            for key in omitted & state_dict.keys():
                del state_dict[key]

        # PyTorch sets attributes on the hook, so it has to be a function.
        handle = self.content.pl_module.register_state_dict_post_hook(omit)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            handle.remove()
