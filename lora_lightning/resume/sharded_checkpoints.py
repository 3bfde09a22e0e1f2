"""Saves and loads checkpoints of adapters for a strategy that does not use its CheckpointIO."""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import nn

from lora_lightning.resume.adapter_checkpoint import AdapterContent
from lora_lightning.resume.checkpoints import ADAPTER_KEY


class ShardedCheckpoints:
    """Omits the frozen base from the state that `ModelParallelStrategy` saves and loads.

    This strategy gathers or shards `state_dict()` itself. While this object is active, the state dict of the model has no base, so the
    base is not gathered on one process and not expected when loading.

    Args:
        content: The content of a checkpoint of the adapted model.
    """

    def __init__(self, content: AdapterContent) -> None:
        self.content = content
        module = content.pl_module
        self._strict = module._strict_loading
        module.strict_loading = False  # `check` compares what there is
        # A function, as PyTorch sets attributes on it.
        self._hook = module.register_state_dict_post_hook(lambda *given: self._leave_out(*given))  # type: ignore[no-untyped-call]
        on_load_checkpoint = module.on_load_checkpoint

        @wraps(on_load_checkpoint)
        def check_first(checkpoint: dict[str, Any]) -> None:
            content.check("The checkpoint", checkpoint.get(ADAPTER_KEY))
            on_load_checkpoint(checkpoint)

        module.on_load_checkpoint = check_first  # type: ignore[method-assign]

    def remove(self) -> None:
        """Restore the model."""
        self._hook.remove()
        self.content.pl_module._strict_loading = self._strict
        del self.content.pl_module.on_load_checkpoint

    def _leave_out(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        if not prefix:  # `base_tensors` asks with a prefix, and gets the base
            for key in self.content.base_keys() & state_dict.keys():
                del state_dict[key]
