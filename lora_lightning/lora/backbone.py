"""Finds the part of a module that is adapted."""

from __future__ import annotations

from torch import nn

from lora_lightning.lora.model import unwrapped


def backbone_of(module: nn.Module) -> nn.Module:
    """Return the one child of `module` that holds all parameters, or `module` itself if there is no such child.

    For a `Classifier` this is the backbone, so that an adapter folder has the backbone's own layer names and serves
    the bare backbone as well.
    """
    holders = [child for child in module.children() if any(True for _ in child.parameters())]
    own = list(module.parameters(recurse=False))
    return unwrapped(holders[0] if len(holders) == 1 and not own else module)
