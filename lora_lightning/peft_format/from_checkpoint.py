"""Attaches the adapters in a checkpoint of a run to a module, without a Trainer."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from lora_lightning.checkpoints import read_checkpoint
from lora_lightning.checkpoints.checkpoints import ADAPTER_KEY, misfits
from lora_lightning.lora import (
    LoRAConfig,
    adapted_weights,
    adapter_state_dict,
    backbone_of,
    base_fingerprint,
    delete_adapter,
)
from lora_lightning.lora.adaptation import attach_as_configured
from lora_lightning.lora.record import unwrapped


def load_from_checkpoint(module: nn.Module, path: Path, name: str, strict: bool) -> list[str]:
    """Attach active adapters in a checkpoint that a run with `LoRAFinetuning` wrote.

    Args:
        module: The base, or a module that contains it in the same place as that of the run.
        path: The checkpoint.
        name: Name of the adapters here, and in the checkpoint if several are active there.
        strict: Whether to refuse adapters of another base.

    Returns:
        The names of the adapted layers.

    Raises:
        ValueError: If the file is damaged, contains no adapters, or does not fit `module`, or because of `strict`.
            `module` is then unchanged.
    """
    checkpoint = read_checkpoint(path)
    description = checkpoint.get(ADAPTER_KEY)
    if description is None:
        raise ValueError(
            f"{path} contains no adapters: it is a full checkpoint. Load it with load_from_checkpoint of its "
            "LightningModule, or pass it to LoRAFinetuning as base_checkpoint."
        )
    part, saved_name = description["part"], _name_in(description["active"], path, name)
    state = {**description.get("left_out", {}), **checkpoint["state_dict"], **description.get("adapter_state", {})}
    adapted = unwrapped(module if not part or not hasattr(module, part.partition(".")[0]) else backbone_of(module))
    settings = description["configs"][saved_name]
    bypass = settings["bypass"]
    attach_as_configured(adapted, LoRAConfig(**settings | {"bypass": tuple(bypass) if bypass else None}), name)
    # Modules that are trained in full are no part of the base, so it is compared when they are known.
    other_base = _difference(adapted, path, description["base_fingerprint"])
    if other_base and strict:
        delete_adapter(adapted, name)
        raise ValueError(other_base)
    own = adapter_state_dict(adapted, name)
    keys = {key: f"{part}.{_renamed(key, name, saved_name)}".lstrip(".") for key in own}
    found = {key: state[saved] for key, saved in keys.items() if saved in state}
    wrong = misfits(found, own)
    if wrong:
        delete_adapter(adapted, name)
        raise ValueError(f"The adapters in {path} do not fit this {type(adapted).__name__}: {wrong}.")
    with torch.no_grad():
        for key, value in found.items():
            own[key].copy_(value)
    if other_base:
        warnings.warn(other_base, stacklevel=3)
    return [weight.name for weight in adapted_weights(adapted, name)]


def _name_in(active: list[str], path: Path, name: str) -> str:
    """Return which of the active adapters of a checkpoint are to be loaded.

    Raises:
        ValueError: If there are several, and none has the name that they should get.
    """
    if len(active) > 1 and name not in active:
        raise ValueError(
            f"{path} contains the adapters {', '.join(map(repr, active))}, which were active together. Load each under "
            f"its name, for example name={active[-1]!r}, and activate them with lora.set_adapter(net, {active})."
        )
    return name if name in active else active[0]


def _renamed(key: str, name: str, saved_name: str) -> str:
    """Return the key of the same tensor under another name of the adapters."""
    parts = key.split(".")
    if len(parts) > 2 and parts[-2] == name and parts[-3].startswith("lora_"):
        parts[-2] = saved_name
    return ".".join(parts)


def _difference(adapted: nn.Module, path: Path, trained_on: str) -> str:
    """Return a message if the adapters were trained on another base, and nothing otherwise."""
    own = base_fingerprint(adapted)
    if own == trained_on:
        return ""
    return (
        f"The adapters in {path} were trained on another base (fingerprint {trained_on[:12]}) than this "
        f"{type(adapted).__name__} ({own[:12]}). Load the weights of the base first."
    )
