"""Determines the adapters that a run trains or tests: new ones, those of a folder, or those of the model."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import TypeAlias

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lora_lightning.backbone_facts import backbone_facts
from lora_lightning.callbacks.relative_names import relative_names
from lora_lightning.callbacks.start_from_data import attach_by_data
from lora_lightning.checkpoints import newest_adapter
from lora_lightning.checkpoints.checkpoints import choice_in_words
from lora_lightning.checkpoints.random_state import own_random_numbers
from lora_lightning.lora import LoRAConfig, adapted_weights, attach, backbone_of, set_adapter
from lora_lightning.lora.matching import Names
from lora_lightning.lora.record import config_of, record_of, unwrapped
from lora_lightning.lora.selection import can_be_name
from lora_lightning.peft_format import load_adapter
from lora_lightning.wording import some_of

Folder: TypeAlias = str | os.PathLike[str]
_NEW = "default"
"""Name of the new adapters of a run."""


def attach_adapters(
    trainer: Trainer,
    pl_module: LightningModule,
    config: LoRAConfig,
    folders: list[Folder] | Folder | None,
    with_new: bool,
    trained: LoRAConfig | None,
) -> None:
    """Attach the adapters of folders, or new ones, or both, to a model without adapters.

    Args:
        trainer: The trainer, whose batches new adapters with `init="eva"` start from.
        pl_module: The model. Its child with all parameters is adapted.
        config: The configuration of new adapters. Names can be relative to the child or to the whole module.
        folders: One adapter folder, or several, whose updates add up; or log folders, whose newest adapter is used.
            `None` creates new adapters.
        with_new: Whether to train new adapters beside those of a list of folders, which are then frozen.
        trained: The configuration of adapters that were trained in separate processes, if any.
    """
    adapted = backbone_of(pl_module)
    if folders is None:
        _attach_new(trainer, pl_module, adapted, config, trained)
    elif isinstance(folders, list):
        names = _load_all(adapted, folders)
        if with_new:
            _attach_new(trainer, pl_module, adapted, config, trained)
        set_adapter(adapted, [*names, _NEW] if with_new else names, trained=_NEW if with_new else names)
    else:
        folder = newest_adapter(folders)
        rank_zero_info(f"Adapter: {choice_in_words(folder)}")
        load_adapter(adapted, folder)


def _load_all(adapted: nn.Module, folders: list[Folder]) -> list[str]:
    """Load the adapters of several folders, and return their names: those of the folders, or else adapter_1, ...."""
    if not folders:
        raise ValueError("adapter=[] names no folder. Leave it out to train new adapters.")
    found = [newest_adapter(folder) for folder in folders]
    names = [folder.resolve().name for folder in found]
    if len({*names, _NEW}) <= len(names) or not all(map(can_be_name, names)):
        names = [f"adapter_{number}" for number in range(1, len(found) + 1)]
    for name, folder in zip(names, found, strict=True):
        rank_zero_info(f"Adapter {name}: {choice_in_words(folder)}")
        load_adapter(adapted, folder, name)
    return names


def _attach_new(
    trainer: Trainer,
    pl_module: LightningModule,
    adapted: nn.Module,
    config: LoRAConfig,
    trained: LoRAConfig | None,
) -> None:
    complete, new = _complete(config, pl_module, adapted)
    if new:
        rank_zero_info(f"New layers are trained in full: {', '.join(new)}.")
    if complete.init == "eva":
        attach_by_data(trainer, pl_module, adapted, complete, _NEW, trained)
        return
    with own_random_numbers():
        attach(adapted, complete, _NEW)


def has_no_start_yet(adapted: nn.Module, config: LoRAConfig) -> bool:
    """Return whether the new adapters of a run had neither batches nor a checkpoint that `init="eva"` starts from."""
    found = adapted_weights(adapted, _NEW) if config.init == "eva" else []
    return any(weight.adapter.config.init != "eva" and weight.adapter.is_zero() for weight in found)


def check_present_adapters(pl_module: LightningModule, config: LoRAConfig, source: str | None) -> None:
    """Check that a run can continue with the adapters that the model already has.

    A cell of a notebook that runs twice then continues to train the adapters, as plain Lightning continues to train the
    weights.

    Args:
        pl_module: A model whose adapters come from another callback or from `attach`.
        config: The configuration of the run.
        source: The argument that names a file or folder to start from, if any.

    Raises:
        ValueError: If the run starts from a file or folder, or if the adapters have another configuration.
    """
    adapted = backbone_of(pl_module)
    modules = {f"model.{name}".rstrip("."): child for name, child in pl_module.named_modules()}
    path, owner = next(
        ((name, child) for name, child in modules.items() if record_of(child) is not None), ("outer_module", None)
    )
    expected, _ = _complete(config, pl_module, adapted)
    if owner is None:
        reason = "adapters that belong to an outer module, which contains it"
    elif owner is not adapted:
        expected_path = next(name for name, child in modules.items() if unwrapped(child) is adapted)
        reason = f"adapters of {path} instead of {expected_path}"
    elif source is not None:
        reason = f"adapters, but {source} is for a model without adapters"
    elif (found := config_of(owner)) != (expected := _with_ranks_of(found, expected)):
        pairs = {each.name: (getattr(found, each.name), getattr(expected, each.name)) for each in fields(expected)}
        differences = [
            f"{name} {has!r} instead of {wanted!r}" for name, (has, wanted) in pairs.items() if has != wanted
        ]
        reason = f"adapters with {some_of(differences)}"
    else:
        rank_zero_info("The model already has adapters. The run continues with them.")
        return
    raise ValueError(
        f"This {type(pl_module).__name__} already has {reason}. Create the model again, remove its adapters with "
        f"lora.detach({path}), or remove LoRAFinetuning."
    )


def _with_ranks_of(found: LoRAConfig, expected: LoRAConfig) -> LoRAConfig:
    """Return the expected configuration with the ranks that were found from data, if any."""
    if not found.init == expected.init == "eva":
        return expected
    names = ("rank_pattern", "alpha_pattern", "target_modules")
    return replace(expected, **{name: getattr(found, name) for name in names})


def _complete(config: LoRAConfig, pl_module: LightningModule, adapted: nn.Module) -> tuple[LoRAConfig, list[str]]:
    """Return the configuration with names relative to the adapted child and with its new layers, and these layers."""
    config = relative_names(config, pl_module, adapted)
    facts, saved = backbone_facts(adapted), config.modules_to_save
    new_head = () if facts is None else facts.new_head
    record = record_of(adapted)
    trained = set() if record is None else {name for values in record.saved.values() for name in values.names}
    missing = [name for name in new_head if name not in trained and not Names(saved).match(name)]
    new = missing if isinstance(saved, list) else []
    return (replace(config, modules_to_save=[*saved, *new]) if new else config), new
