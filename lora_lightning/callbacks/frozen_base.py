"""Verifies that the frozen base has not changed."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lora_lightning.lora import some_of
from lora_lightning.lora.fingerprint import digests
from lora_lightning.lora.freeze import FrozenStatistics


class FrozenBase:
    """Compares the base with its state at the start of training.

    Parameters and the statistics of norm layers must not change by a single bit. The user's code may update other buffers (the centre of
    DINO's teacher, the counts of a metric). A warning names these buffers, and checkpoints include them.

    Args:
        adapted: The module that `attach` was called with.
    """

    def __init__(self, adapted: nn.Module) -> None:
        self.adapted = adapted
        self.at_start = digests(adapted)
        self._warned = False

    def changed(self) -> tuple[list[str], list[str]]:
        """Return the keys of the parameters and norm statistics that changed, and of the other buffers that changed."""
        own = self._buffers_of_the_users()
        now = digests(self.adapted)
        changed = [key for key, digest in self.at_start.items() if now.get(key) != digest]
        return [key for key in changed if key not in own], [key for key in changed if key in own]

    def warn_of_buffers(self) -> None:
        """Warn once about the buffers that the user's code has changed."""
        if self._warned:
            return
        own = self._buffers_of_the_users()
        now = digests(self.adapted, only=own)
        changed = [key for key, digest in now.items() if self.at_start.get(key) != digest]
        if changed:
            self._warned = True
            rank_zero_warn(
                f"Buffers of the base changed during training: {some_of(map(repr, changed))}. They are saved in checkpoints, but not in adapter "
                "folders. Frozen parameters and norm statistics have not changed."
            )

    def _buffers_of_the_users(self) -> set[str]:
        return {
            f"{name}.{key}".lstrip(".")
            for name, module in self.adapted.named_modules()
            if not isinstance(module, FrozenStatistics)
            for key in module._buffers
        }
