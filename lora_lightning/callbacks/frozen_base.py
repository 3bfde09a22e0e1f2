"""Verifies that the frozen base has not changed."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lora_lightning.callbacks.adapted_part import adapted_part
from lora_lightning.callbacks.finished_bar import finish_bar
from lora_lightning.lora import adapter_state_dict
from lora_lightning.lora.adapter import is_distributed, is_quantized
from lora_lightning.lora.fingerprint import BaseDigests, base_tensors, digests
from lora_lightning.lora.freeze import FrozenStatistics
from lora_lightning.lora.record import active_names, attachment_of, trained_names
from lora_lightning.lora.sharding import full
from lora_lightning.wording import some_of


class FrozenBase(Callback):
    """Compares the base at the end of `fit` with the base at its start.

    No tensor may change by a single bit, except those that the user's code may update itself: buffers other than the
    statistics of norm layers (the centre of DINO's teacher, the counts of a metric), and parameters that were already
    frozen before `attach` while others were not (a teacher that follows its student by a moving average). A warning
    names those that change. Active adapters that are frozen belong to the base in this sense.

    `LoRAFinetuning` includes this callback, and its checkpoints include the tensors that the user's code has updated.
    Add it to runs whose module attaches adapters itself.

    Attributes:
        in_words: What the last `fit` found, for example `bitwise unchanged (SHA-256 6831adb07804)`. Empty before.

    Raises:
        ValueError: In `fit`, if `attach` was not called with one part of the module.
        RuntimeError: At the end of `fit`, if the base has changed.
    """

    def __init__(self) -> None:
        self.in_words = ""
        self._known: BaseDigests | None = None
        self._start: BaseAtStart | None = None

    def set_base(self, base: BaseDigests | None) -> None:
        """Set digests that were computed before `fit`. They are used if nothing has written to the base since."""
        self._known = base

    @property
    def start(self) -> BaseAtStart:
        """Return the base at the start of the current `fit`."""
        assert self._start is not None, "there is no fit"
        return self._start

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.in_words = ""
        # Not in setup, since a precision such as bf16-true converts the base after it.
        self._start = BaseAtStart(adapted_part(pl_module), self._known if trainer.world_size == 1 else None)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start.warn_of_changes()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        frozen, updated = self.start.changed()
        if frozen:
            raise RuntimeError(
                f"The frozen base changed during training: {some_of(map(repr, frozen))}. Some code writes to them, for "
                "example an optimizer that has these parameters."
            )
        kind, names = self.start.kind_of(updated), some_of(map(repr, updated))
        but = f", but for {kind} that the model's own code changes: {names}" if updated else ""
        self.in_words = f"bitwise unchanged{but} (SHA-256 {self.start.base.fingerprint[:12]})"
        finish_bar(trainer, pl_module)
        rank_zero_info(f"The base is {self.in_words}.")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # which Lightning does not call after an exception

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._known = self._start = None


class BaseAtStart:
    """Compares a base with what it was when this object was created.

    Args:
        adapted: The module that `attach` was called with.
        known: Digests of the base that were computed before. They are used if nothing has written to it since.

    Attributes:
        base: Digests of the base.
        updatable: Digests of the tensors that the user's code may update.
    """

    def __init__(self, adapted: nn.Module, known: BaseDigests | None = None) -> None:
        self.adapted = adapted
        self.base = known if known is not None and known.is_current(adapted) else BaseDigests.of(adapted)
        self._at_start = self.base.of_tensors
        self._buffers = _user_buffers(adapted)
        own = self._buffers | _frozen_before(adapted)
        self.updatable = {key: digest for key, digest in self._at_start.items() if key in own}
        self._adapters = {key: value.clone() for key, value in _frozen_adapters(adapted).items()}
        self._warned = False
        self._writes: dict[str, int] | None = self._count_writes()

    def changed(self) -> tuple[list[str], list[str]]:
        """Return the keys of the frozen tensors that changed, and of those that the user's code may update and has."""
        now = digests(self.adapted)
        changed = [key for key, digest in self._at_start.items() if now.get(key) != digest]
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
        changed = [key for key, digest in digests(self.adapted, only=written).items() if digest != self._at_start[key]]
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
            if key in self._at_start
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
