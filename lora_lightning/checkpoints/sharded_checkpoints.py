"""Saves and loads checkpoints of adapters for a strategy that does not use its CheckpointIO."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lora_lightning.checkpoints.adapter_checkpoint import (
    AdapterContent,
    CheckpointListener,
    NotFiniteError,
    not_finite,
    not_written,
)
from lora_lightning.checkpoints.checkpoints import ADAPTER_KEY


class ShardedCheckpoints:
    """Omits the frozen base from the checkpoints that `ModelParallelStrategy` saves and loads.

    This strategy gathers or shards the state of the model itself, so four of its methods are replaced on the object.
    The base is not in the state dict of the model while they run: it is neither gathered on one process nor expected
    when loading. After the adapters are merged or detached, or if the trainer has another model, checkpoints are passed
    on unchanged.

    Args:
        strategy: The strategy.
        content: The content of a checkpoint of the adapted model.
        listener: Is told, in all processes, which checkpoints are saved and removed.

    Attributes:
        closed: Whether saving and removing are disabled because the adapters are not finite.
    """

    def __init__(self, strategy: ModelParallelStrategy, content: AdapterContent, listener: CheckpointListener) -> None:
        self.listener = listener
        self.strategy = strategy
        self.content = content
        self.closed = False
        for name in ("lightning_module_state_dict", "save_checkpoint", "load_checkpoint", "remove_checkpoint"):
            vars(strategy).pop(name, None)  # replaced in an earlier run
        self._state = strategy.lightning_module_state_dict
        self._save = strategy.save_checkpoint
        self._load = strategy.load_checkpoint
        self._remove = strategy.remove_checkpoint
        # This strategy does not use its CheckpointIO, which is replaced for all others, and no hook of a callback sees
        # the state before it is gathered: https://github.com/Lightning-AI/pytorch-lightning/pull/19888
        strategy.lightning_module_state_dict = self.state_dict  # type: ignore[method-assign]
        strategy.save_checkpoint = self.save_checkpoint  # type: ignore[method-assign]
        strategy.load_checkpoint = self.load_checkpoint  # type: ignore[method-assign]
        strategy.remove_checkpoint = self.remove_checkpoint  # type: ignore[method-assign]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the model without the base."""
        with self._without_base():
            return self._state()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint with a description of the adapters.

        Raises:
            NotFiniteError: In all processes, if adapters contain NaN or infinity in one of them.
        """
        if self.closed:
            return
        if self.content.applies(self.strategy):
            # In the state that is written, only one process has the adapters.
            names = not_finite(self.content.pl_module.state_dict(), self.content.trained_keys())
            if not self.strategy.reduce_boolean_decision(not names):
                raise NotFiniteError(not_written(filepath, names or ["adapters of another process"]))
            checkpoint[ADAPTER_KEY] = self.content.description()
            self.listener.saved(str(filepath), {})
        self._save(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint into the model and check that it belongs to the base and the adapters.

        Raises:
            ValueError: For the reasons of `AdapterContent.check`.
        """
        module = self.content.pl_module
        strict = module._strict_loading
        if self.content.applies(self.strategy):
            module.strict_loading = False  # the description is compared instead
            self.content.keep(_keys_in(Path(self.strategy.broadcast(checkpoint_path)), *args, **kwargs))
        try:
            with self._without_base():
                checkpoint = self._load(checkpoint_path, *args, **kwargs)
        finally:
            module._strict_loading = strict
        if self.content.applies(self.strategy):
            self.content.check("The checkpoint", checkpoint.get(ADAPTER_KEY))
        return checkpoint

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint."""
        if not self.closed:
            self._remove(filepath)
            self.listener.removed(str(filepath))

    @contextmanager
    def _without_base(self) -> Iterator[None]:
        """Omit the base from the state dict of the model within this context."""
        omitted = self.content.base_keys() if self.content.applies(self.strategy) else set()

        def omit(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
            for key in omitted & state_dict.keys():
                del state_dict[key]

        # PyTorch sets attributes on the hook, so it has to be a function.
        handle = self.content.pl_module.register_state_dict_post_hook(omit)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            handle.remove()


def _keys_in(path: Path, weights_only: bool | None = None) -> set[str]:
    """Return the keys of the model's state in a folder of shards, or in a file, which is not read into memory."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    if (path / ".metadata").is_file():
        return {key.removeprefix("state_dict.") for key in FileSystemReader(path).read_metadata().state_dict_metadata}
    if path.is_file():
        return set(torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)["state_dict"])
    return set()  # Lightning refuses such a path
