"""Finds the part of a `LightningModule` that has adapters."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from torch import nn

from lora_lightning.lora.record import record_of, unwrapped


def adapted_part(pl_module: LightningModule) -> nn.Module:
    """Return the part of the module that `attach` was called with, the outer one if it was called within it as well.

    Raises:
        ValueError: If there is none, or if there are several beside each other.
    """
    found: list[nn.Module] = []
    inside: set[int] = set()
    for child in map(unwrapped, pl_module.modules()):
        if id(child) not in inside and record_of(child) is not None:
            found.append(child)
            inside |= {id(each) for each in child.modules()}
    if len(found) != 1:
        raise ValueError(
            f"attach was called with {len(found)} parts of this {type(pl_module).__name__}; expected one. Call "
            "lora.attach(part, lora.LoRAConfig(...)) in __init__, setup or configure_model, or use LoRAFinetuning."
        )
    return found[0]
