"""Finds the part of a module that is adapted."""

from __future__ import annotations

from torch import nn

from lora_lightning.lora.record import unwrapped


def backbone_of(module: nn.Module) -> nn.Module:
    """Return the child of `module` that holds all parameters, or `module` itself if none does.

    For a `Classifier` this is the backbone. An adapter folder then contains the layer names of the backbone and can be
    loaded into the backbone alone.
    """
    with_parameters = [child for child in module.children() if any(True for _ in child.parameters())]
    own = list(module.parameters(recurse=False))
    return unwrapped(with_parameters[0] if len(with_parameters) == 1 and not own else module)
