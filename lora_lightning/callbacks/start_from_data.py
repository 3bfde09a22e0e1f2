"""Attaches adapters that start from the first batches of a run: `init="eva"`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from lora_lightning.checkpoints import ResumableLoader
from lora_lightning.checkpoints.checkpoints import adapters_in
from lora_lightning.checkpoints.random_state import own_random_numbers, random_state, restore_random_state
from lora_lightning.lightning_packages import is_a
from lora_lightning.lora import EVAStart, LoRAConfig, attach, eva
from lora_lightning.lora.adaptation import attach_as_configured
from lora_lightning.wording import some_of

BATCHES = 8
"""Number of batches that are read."""
_NOTE = (
    "This happened while init='eva' ran training_step on the first batches, in evaluation mode and before the "
    "optimizer exists, to see the inputs of the layers. Use another init if this module cannot do that."
)


def attach_by_data(
    trainer: Trainer,
    pl_module: LightningModule,
    adapted: nn.Module,
    config: LoRAConfig,
    name: str,
    trained: LoRAConfig | None,
) -> None:
    """Attach adapters of a run with `init="eva"`.

    A run that starts from a checkpoint has its ranks, and reads no batches. Without a checkpoint, `fit` finds ranks and
    initial values. Other commands then have adapters without effect, which `fit` replaces.

    Args:
        trainer: The trainer.
        pl_module: The module.
        adapted: The part of it that is adapted.
        config: The configuration of the adapters.
        name: The name of the adapters.
        trained: The configuration of adapters that were trained in separate processes, if any.

    Raises:
        ValueError: If the strategy distributes the weights, or `training_step` needs an optimizer.
    """
    known = trained or _config_in_checkpoint(trainer, name)
    if known is not None:
        with own_random_numbers():
            attach_as_configured(adapted, known, name)
    elif trainer.state.fn != "fit":
        with own_random_numbers():
            attach(adapted, replace(config, init="kaiming"), name)
    else:
        start = _eva_of_first_batches(trainer, pl_module, adapted, config)
        with own_random_numbers():
            start.attach(adapted, name)


def _config_in_checkpoint(trainer: Trainer, name: str) -> LoRAConfig | None:
    """Return the configuration of such adapters in the checkpoint that a run starts from, if any."""
    path = _checkpoint_of(trainer)
    if path is None:
        return None
    if "://" in str(path):
        files = trainer.strategy.checkpoint_io
        description = files.load_checkpoint(str(path), map_location="cpu").get("lora_lightning")
    else:
        description = adapters_in(Path(path))
    found = None if description is None else description["configs"].get(name)
    if found is None or found["init"] != "eva":
        return None
    bypass = found["bypass"]
    return LoRAConfig(**found | {"bypass": tuple(bypass) if bypass else None})


def _checkpoint_of(trainer: Trainer) -> str | Path | None:
    """Return the checkpoint that the current run starts from.

    Lightning notes it as `trainer.ckpt_path` when the module is set up and its parameters have their final shapes.
    Before that, only the running call knows it.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            running: str | Path | None = frame.f_locals["ckpt_path"]
            return running
        frame = frame.f_back
    return trainer.ckpt_path


def _eva_of_first_batches(
    trainer: Trainer, pl_module: LightningModule, adapted: nn.Module, config: LoRAConfig
) -> EVAStart:
    """Return what EVA finds in the first batches. All processes get that of the first one."""
    strategy = trainer.strategy
    if is_a(strategy, ModelParallelStrategy):
        raise ValueError(
            "init='eva' is not possible where ModelParallelStrategy distributes the weights. Use lora.eva and "
            "save_adapter in a process of its own, and LoRAFinetuning(adapter=folder)."
        )
    by_iterator = is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True)
    if by_iterator or not pl_module.automatic_optimization:
        needs = "an iterator of batches" if by_iterator else "its optimizers (automatic_optimization=False)"
        raise ValueError(
            f"init='eva' runs training_step on a few batches before the optimizer exists, but that of this "
            f"{type(pl_module).__name__} needs {needs}. Use lora.eva and save_adapter before the training, and "
            "LoRAFinetuning(adapter=folder)."
        )
    if strategy.root_device.type != "cpu":
        pl_module.to(strategy.root_device)  # where Lightning would move it next
    before = {key: value._version for key, value in pl_module.named_parameters() if not value.is_inference()}
    module = _silent_copy(pl_module, trainer)
    part = next(key for key, child in pl_module.named_modules() if child is adapted)
    numbers, takes_number = count(), is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)

    def step(batch: Any) -> object:
        precision = strategy.precision_plugin
        with precision.forward_context() if is_a(precision, MixedPrecision) else nullcontext():
            return module.training_step(batch, next(numbers)) if takes_number else module.training_step(batch)

    with _first_batches(trainer, pl_module) as batches:
        try:
            start = eva(module.get_submodule(part), config, batches, step)
        except Exception as error:
            error.add_note(_NOTE)
            raise
    changed = [key for key, value in pl_module.named_parameters() if before.get(key, value._version) != value._version]
    if changed:
        raise ValueError(
            f"training_step of this {type(pl_module).__name__} changes {some_of(map(repr, changed))}, so init='eva' "
            "cannot try it before the training. Use another init."
        )
    return strategy.broadcast(start) if trainer.world_size > 1 else start


def _silent_copy(pl_module: LightningModule, trainer: Trainer) -> LightningModule:
    """Return a copy that logs nothing. It shares the parameters, and has its own buffers, metrics and attributes."""
    shared: dict[int, Any] = {id(value): value for value in pl_module.parameters()}
    try:
        copied = copy.deepcopy(pl_module, shared)
    except (TypeError, RuntimeError, AttributeError, copy.Error) as error:
        raise TypeError(
            f"init='eva' tries a copy of the module, but this {type(pl_module).__name__} cannot be copied: {error}"
        ) from error
    copied.trainer = trainer
    for child in copied.modules():
        if is_a(child, LightningModule):
            vars(child).update(log=_log_nothing, log_dict=_log_nothing)
    return copied


def _log_nothing(*arguments: object, **keywords: object) -> None:
    """Stand for `log` and `log_dict`."""


@contextmanager
def _first_batches(trainer: Trainer, pl_module: LightningModule) -> Iterator[Iterator[Any]]:
    """Yield an iterator over the first training batches, and leave loaders and random states as they were."""
    numbers = random_state()
    with own_random_numbers():
        loader = trainer.fit_loop._data_source.dataloader()
        combined = loader if is_a(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")
        generators = {
            generator: generator.get_state()
            for each in combined.flattened
            for owner in (each, getattr(each, "sampler", None))
            if isinstance(generator := getattr(owner, "generator", None), torch.Generator)
        }
        try:
            yield (_prepared(trainer, pl_module, *found) for found in islice(iter(combined), BATCHES))
        finally:
            combined.reset()
            for generator, state in generators.items():
                generator.set_state(state)
            for each in combined.flattened:
                if isinstance(each, ResumableLoader):
                    each.begin_epoch()
            restore_random_state(numbers)


def _prepared(trainer: Trainer, pl_module: LightningModule, batch: Any, number: int, loader: int) -> Any:
    """Return a batch on the device, after the hooks of module or data."""
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=loader)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=loader)
