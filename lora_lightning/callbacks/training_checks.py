"""Checks that a run can train the adapters, without changing the model."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from typing_extensions import override

from lora_lightning.callbacks.adapted_part import adapted_part
from lora_lightning.lightning_packages import is_a
from lora_lightning.lora import adapted_weights, adapter_parameters
from lora_lightning.wording import some_of


class TrainingChecks(Callback):
    """Refuses optimizers and callbacks that would not train the adapters alone, and warns about idle dropout.

    Raises:
        ValueError: In `fit`, if the optimizer lacks adapters or has other parameters, or if frozen ones are pruned.
    """

    def __init__(self) -> None:
        self._is_first_batch = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_first_batch = True
        _refuse_pruning(trainer)
        _check_optimizers(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:  # after the other callbacks have started the epoch
            _check_optimizers(trainer, pl_module)
        if self._is_first_batch:
            self._is_first_batch = False
            _warn_of_idle_dropout(adapted_part(pl_module))


def _check_optimizers(trainer: Trainer, pl_module: LightningModule) -> None:
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
    ours = {id(parameter) for parameter in adapter_parameters(adapted_part(pl_module))}
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


def _warn_of_idle_dropout(adapted: nn.Module) -> None:
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


def _refuse_pruning(trainer: Trainer) -> None:
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
