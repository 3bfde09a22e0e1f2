"""Verifies that the frozen base has not changed."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lora_lightning.lora import adapter_state_dict
from lora_lightning.lora.adapter import is_distributed, is_quantized
from lora_lightning.lora.fingerprint import BaseDigests, base_tensors, digests
from lora_lightning.lora.freeze import FrozenStatistics
from lora_lightning.lora.record import active_names, attachment_of, trained_names
from lora_lightning.lora.sharding import full
from lora_lightning.wording import some_of


class FrozenBase:
    """Compares the base with its state at the start of training.

    No tensor may change by a single bit, except those that the user's code may update itself: buffers other than the
    statistics of norm layers (the centre of DINO's teacher, the counts of a metric), and parameters that were already
    frozen before `attach` while others were not (a teacher that follows its student by a moving average). A warning
    names those that change, and checkpoints include them. Active adapters that are frozen belong to the base in this
    sense.

    Args:
        adapted: The module that `attach` was called with.
        known: Digests of the base that were computed before. They are used if nothing has written to it since.

    Attributes:
        base: Digests of the base at the start of training.
        updatable: Digests of the tensors that the user's code may update, at the start of training.
    """

    def __init__(self, adapted: nn.Module, known: BaseDigests | None = None) -> None:
        self.adapted = adapted
        self.base = known if known is not None and known.is_current(adapted) else BaseDigests.of(adapted)
        self.at_start = self.base.of_tensors
        self._buffers = _user_buffers(adapted)
        own = self._buffers | _frozen_before(adapted)
        self.updatable = {key: digest for key, digest in self.at_start.items() if key in own}
        self._adapters = {key: value.clone() for key, value in _frozen_adapters(adapted).items()}
        self._warned = False
        self._writes: dict[str, int] | None = self._count_writes()

    def changed(self) -> tuple[list[str], list[str]]:
        """Return the keys of the frozen tensors that changed, and of those that the user's code may update and has."""
        now = digests(self.adapted)
        changed = [key for key, digest in self.at_start.items() if now.get(key) != digest]
        adapters = _frozen_adapters(self.adapted)
        moved = [
            key
            for key, value in self._adapters.items()
            if key in adapters and not torch.equal(adapters[key], value.to(adapters[key].device))
        ]
        frozen = [key for key in changed if key not in self.updatable]
        return frozen + moved, [key for key in changed if key in self.updatable]

    def warn_of_changes(self) -> None:
        """Warn once about tensors that the user's code has updated, and once about frozen tensors that have changed.

        Frozen tensors are only hashed if something has written to them since the last call. They are not refused yet,
        since the code may restore them before the end of training.
        """
        self._warn_of_frozen()
        self._warn_of_updates()

    def _warn_of_frozen(self) -> None:
        if self._writes is None:
            return
        before, self._writes = self._writes, self._count_writes()
        written = {key for key, count in self._writes.items() if before.get(key) != count}
        changed = [key for key, digest in digests(self.adapted, only=written).items() if digest != self.at_start[key]]
        if changed:
            self._writes = None
            rank_zero_warn(
                f"The frozen base has changed: {some_of(map(repr, changed))}. Some code writes to them. `fit` will end "
                "with an error unless they are restored, since the adapters only fit this base."
            )

    def _warn_of_updates(self) -> None:
        if self._warned:
            return
        now = digests(self.adapted, only=self.updatable)
        changed = [key for key, digest in self.updatable.items() if now.get(key) != digest]
        if changed:
            self._warned = True
            rank_zero_warn(
                f"{self.kind_of(changed).capitalize()} of the base changed during training: "
                f"{some_of(map(repr, changed))}. They are saved in checkpoints, but not in adapter folders."
            )

    def _count_writes(self) -> dict[str, int]:
        """Return PyTorch's counts of in-place operations on the frozen tensors that are complete on this device."""
        return {
            key: value._version
            for key, value in base_tensors(self.adapted)
            if key in self.at_start
            and key not in self.updatable
            and not (is_distributed(value) or value.is_inference())
        }

    def kind_of(self, keys: list[str]) -> str:
        """Return what the tensors of these keys are: `buffers`, `parameters`, or `tensors` for both."""
        buffers = self._buffers.intersection(keys)
        return "parameters" if not buffers else "buffers" if len(buffers) == len(keys) else "tensors"


def _frozen_adapters(adapted: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the active adapters that are frozen, by state-dict key."""
    trained = trained_names(adapted)
    frozen = [name for name in active_names(adapted) if trained and name not in trained]
    return {key: full(value) for name in frozen for key, value in adapter_state_dict(adapted, name).items()}


def _user_buffers(adapted: nn.Module) -> set[str]:
    """Return the keys of the buffers other than the statistics of norm layers."""
    return {
        f"{name}.{key}".lstrip(".")
        for name, module in adapted.named_modules()
        if not isinstance(module, FrozenStatistics)
        for key in module._buffers
    }


def _frozen_before(adapted: nn.Module) -> set[str]:
    """Return the keys of the parameters that were frozen before `attach`, if others were not."""
    trainable = attachment_of(adapted).was_trainable
    return {
        name
        for name, value in adapted.named_parameters()
        if trainable and name not in trainable and value.is_floating_point() and not is_quantized(value)
    }
