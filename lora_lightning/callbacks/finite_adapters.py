"""Stops training if what is trained is no longer finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lora_lightning.callbacks.adapted_part import adapted_part
from lora_lightning.checkpoints import NotFiniteError
from lora_lightning.lora import adapter_state_dict
from lora_lightning.lora.sharding import local
from lora_lightning.wording import some_of


class FiniteAdapters(Callback):
    """Stops training if adapters, or modules that are trained in full, are no longer finite.

    On one device, the values are checked after a loss that is not finite; mixed precision may skip such a step without
    any harm. On an accelerator, the losses are checked every `log_every_n_steps` batches, to avoid synchronization. On
    several devices, the values are checked every `log_every_n_steps` batches, since all devices then find the same. The
    values are checked after each epoch, too.

    `LoRAFinetuning` includes this callback, and its checkpoints refuse such values as well. Add it to runs whose module
    attaches adapters itself.

    Raises:
        ValueError: In `fit`, if `attach` was not called with one part of the module.
        NotFiniteError: In `fit`, if adapters are not finite. The message names them, the batch, and the last finite
            checkpoint.
    """

    def __init__(self) -> None:
        self._adapted: nn.Module | None = None
        self._losses: list[tuple[int, Tensor]] = []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._adapted, self._losses = adapted_part(pl_module), []

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        number = trainer.fit_loop.total_batch_idx
        every = trainer.log_every_n_steps or 50  # type: ignore[attr-defined] # Trainer sets it from elsewhere
        if trainer.world_size > 1:
            if (number + 1) % every == 0:
                self._check(trainer)
            return
        found = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        loss = found if isinstance(found, Tensor) and found.numel() == 1 else None
        if loss is not None and loss.device.type == "cpu":
            if not math.isfinite(loss.item()):
                self._check(trainer, number)
            return
        if loss is not None:
            self._losses.append((number, loss.detach()))
        if (number + 1) % every == 0:
            self._check_losses(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # which Lightning does not call after an exception

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._adapted, self._losses = None, []

    def _check(self, trainer: Trainer, began: int | None = None) -> None:
        """Check the adapters, after the batch of this number had a loss that was not finite, if any."""
        assert self._adapted is not None
        names = [
            key for key, value in adapter_state_dict(self._adapted).items() if not bool(local(value).isfinite().all())
        ]
        if trainer.world_size > 1 and not trainer.strategy.reduce_boolean_decision(not names):
            names = names or ["the adapters of another process"]  # all devices stop together
        if not names:
            return
        since = "" if began is None else f" since batch {began} (counted from 0), whose loss was not finite"
        files = trainer.checkpoint_callback
        last = getattr(files, "last_model_path", "") or getattr(files, "best_model_path", "")
        kept = f"The last checkpoint, {last}, is finite. " if last else ""
        raise NotFiniteError(
            f"Training has diverged: {some_of(map(repr, names))} contain NaN or infinity{since}. {kept}Lower the "
            "learning rate, or clip gradients with gradient_clip_val."
        )

    def _check_losses(self, trainer: Trainer) -> None:
        if not self._losses:
            self._check(trainer)
            return
        finite = torch.stack([loss for _, loss in self._losses]).isfinite().tolist()
        began = next((number for (number, _), good in zip(self._losses, finite, strict=True) if not good), None)
        self._losses = []
        if began is not None:
            self._check(trainer, began)
