"""Checks the training of adapters without changing the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lora_lightning.checkpoints import NotFiniteError
from lora_lightning.checkpoints.adapter_checkpoint import AdapterCheckpointIO
from lora_lightning.checkpoints.sharded_checkpoints import ShardedCheckpoints
from lora_lightning.lightning_packages import is_a
from lora_lightning.lora import adapted_weights, adapter_parameters, adapter_state_dict
from lora_lightning.lora.sharding import full, local
from lora_lightning.wording import some_of


def check_optimizers(trainer: Trainer, pl_module: LightningModule, adapted: nn.Module) -> None:
    """Compare the parameters of the optimizers with those that should be trained.

    Raises:
        ValueError: If adapters are in no optimizer, or if an optimizer has other trained parameters. The message names
            them.
    """
    if not any(optimizer.param_groups for optimizer in trainer.optimizers):
        return  # the module uses its own optimizers, or does not train, and Lightning warns
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    if held and held.isdisjoint({id(parameter) for parameter in pl_module.parameters()}):
        return  # a strategy such as DeepSpeed's replaced the parameters with copies
    ours = {id(parameter) for parameter in adapter_parameters(adapted)}
    trainable = {name: id(p) for name, p in pl_module.named_parameters() if p.requires_grad}
    module = type(pl_module).__name__
    if missing := [name for name, key in trainable.items() if key in ours and key not in held]:
        raise ValueError(
            f"The optimizer of this {module} does not have {some_of(map(repr, missing))}: these adapters would never "
            "be trained. Create it in configure_optimizers, when the adapters exist, from the parameters that require "
            "gradients; or leave the layers out with exclude_modules. If a library creates it earlier, call "
            "lora.attach(lora.backbone_of(module), lora.LoRAConfig(...)) before that, with the configuration of "
            "LoRAFinetuning, which then trains these adapters."
        )
    if in_full := [name for name, key in trainable.items() if key in held and key not in ours]:
        raise ValueError(
            f"The optimizer of this {module} has {some_of(map(repr, in_full))}, which are not adapters: they would be "
            "trained in full, and be missing from the adapter folder. Create these layers before the optimizer, in "
            "__init__, setup or configure_model, and name them in modules_to_save; or freeze them, and remove "
            "callbacks like BackboneFinetuning that unfreeze them."
        )


def warn_of_idle_dropout(adapted: nn.Module) -> None:
    """Warn about trained adapters whose dropout never acts, since their layers are in evaluation mode."""
    idle = [
        each.title
        for each in adapted_weights(adapted)
        if each.is_trained and each.adapter.config.dropout and not each.adapter.training
    ]
    if idle:
        shown = [name or type(adapted).__name__ for name in idle]
        rank_zero_warn(
            f"The dropout of LoRAConfig never acts in {some_of(map(repr, shown))}: these layers are in evaluation "
            "mode, as from_pretrained leaves them, and Lightning keeps this mode in training. Call train() on the "
            "network before fit, or set dropout=0."
        )


def refuse_pruning(trainer: Trainer) -> None:
    """Refuse `ModelPruning` of frozen parameters, which would change the base, or end the run after the first epoch.

    Raises:
        ValueError: If frozen parameters are to be pruned.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined] # Trainer sets it from elsewhere
        if is_a(callback, ModelPruning):
            pruned = [(layer, layer._parameters.get(name), name) for layer, name in callback._parameters_to_prune]
            frozen = [
                f"{name} of a {type(layer).__name__}"
                for layer, value, name in pruned
                if value is not None and not value.requires_grad
            ]
            if frozen:
                raise ValueError(
                    f"ModelPruning is configured to prune frozen parameters: {some_of(frozen)}. Prune the base before "
                    "adapters are attached, or pass the layers in modules_to_save as parameters_to_prune."
                )


def refuse_strategy(strategy: Strategy) -> None:
    """Refuse strategies that replace the parameters that adapters belong to.

    Raises:
        ValueError: For FSDP1 and DeepSpeed stage 3. The message names an alternative.
    """
    stage_3 = is_a(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
    if is_a(strategy, FSDPStrategy) or stage_3:
        name = f"{type(strategy).__name__}{' with stage 3' if stage_3 else ''}"
        raise ValueError(
            f"{name} replaces the parameters that adapters belong to. Use ModelParallelStrategy, which is FSDP2, with "
            "fully_shard in configure_model; or ddp."
        )


class UntrainedAdapters:
    """Finds adapters that an epoch of training has not changed."""

    def __init__(self, adapted: nn.Module, step: int) -> None:
        self.adapted = adapted
        self.step = step
        self.before = {name: full(up.detach()).clone() for name, up in _last_factors(adapted).items()}

    def warn(self, trainer: Trainer) -> None:
        """Warn about these adapters."""
        if trainer.global_step == self.step:
            return
        now = _last_factors(self.adapted)  # others may have been attached or activated since
        names = [
            name
            for name, old in self.before.items()
            if name in now and torch.equal(full(now[name]).to(old.device), old)
        ]
        if names:
            shown = [name or type(self.adapted).__name__ for name in names]
            rank_zero_warn(
                f"Training has not changed the adapters of {some_of(map(repr, shown))}: no gradient has reached them "
                "in the first epoch, or the learning rate was zero. If nothing calls these layers, leave them out with "
                "exclude_modules; verify=False turns this warning off."
            )


class FiniteAdapters:
    """Stops training if what is trained is no longer finite.

    Checkpoints refuse such values as well, so the last finite checkpoint is kept. On one device, the values are checked
    after a loss that is not finite; mixed precision may skip such a step without any harm. On several, they are checked
    every `log_every_n_steps` batches, since all devices then find the same.

    Args:
        adapted: The model with the adapters.
        checkpoints: Writes the checkpoints of the run, and nothing more after an error.
    """

    def __init__(self, adapted: nn.Module, checkpoints: AdapterCheckpointIO | ShardedCheckpoints | None) -> None:
        self.adapted = adapted
        self.checkpoints = checkpoints
        self.losses: list[tuple[int, Tensor]] = []

    def look(self, trainer: Trainer, outputs: Any) -> None:
        """Check the loss after a batch.

        On an accelerator, the losses are checked every `log_every_n_steps` batches, to avoid synchronization.
        """
        number = trainer.fit_loop.total_batch_idx
        every = trainer.log_every_n_steps or 50  # type: ignore[attr-defined] # Trainer sets it from elsewhere
        if trainer.world_size > 1:
            if (number + 1) % every == 0:
                self.check(trainer)
            return
        found = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        loss = found if isinstance(found, Tensor) and found.numel() == 1 else None
        if loss is not None and loss.device.type == "cpu":
            if not math.isfinite(loss.item()):
                self.check(trainer, number)
            return
        if loss is not None:
            self.losses.append((number, loss.detach()))
        if (number + 1) % every == 0:
            self._check_losses(trainer)

    def check(self, trainer: Trainer, began: int | None = None) -> None:
        """Check the adapters.

        Raises:
            NotFiniteError: If adapters are not finite. The message names them, the batch, and the last finite
                checkpoint.
        """
        names = [
            key for key, value in adapter_state_dict(self.adapted).items() if not bool(local(value).isfinite().all())
        ]
        if trainer.world_size > 1 and not trainer.strategy.reduce_boolean_decision(not names):
            names = names or ["the adapters of another process"]  # all devices stop together
        if not names:
            return
        if self.checkpoints is not None:
            self.checkpoints.closed = True  # also for a ModelCheckpoint that saves on exceptions
        since = "" if began is None else f" since batch {began} (counted from 0), whose loss was not finite"
        files = trainer.checkpoint_callback
        last = getattr(files, "last_model_path", "") or getattr(files, "best_model_path", "")
        kept = f"The last checkpoint, {last}, is finite. " if last else ""
        raise NotFiniteError(
            f"Training has diverged: {some_of(map(repr, names))} contain NaN or infinity{since}. {kept}Lower the "
            "learning rate, or clip gradients with gradient_clip_val."
        )

    def _check_losses(self, trainer: Trainer) -> None:
        if not self.losses:
            self.check(trainer)
            return
        finite = torch.stack([loss for _, loss in self.losses]).isfinite().tolist()
        began = next((number for (number, _), good in zip(self.losses, finite, strict=True) if not good), None)
        self.losses = []
        if began is not None:
            self.check(trainer, began)


def _last_factors(adapted: nn.Module) -> dict[str, nn.Parameter]:
    """Return B of each trained adapter, or A if that alone is trained, by the name of the weight."""
    found = {}
    for each in adapted_weights(adapted):
        if each.is_trained:
            a, b = each.factors
            found[each.title] = a if "lora_B" in each.adapter.fixed else b
    return found
