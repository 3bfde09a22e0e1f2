"""Scales the updates of adapters: W + λ ΔW."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lora_lightning.lora.model import adapted_weights, attachment_of


@contextmanager
def scaled(module: nn.Module, factor: float) -> Iterator[None]:
    """Multiply the update of each adapter of `module` by `factor` within this context. 0 gives the base, and 1 has no effect."""
    adapters = [each.adapter for each in adapted_weights(module)]
    before = [adapter.lora_scaling for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.lora_scaling *= factor
        yield
    finally:
        for adapter, scaling in zip(adapters, before, strict=True):
            adapter.lora_scaling = scaling


@torch.no_grad()
def scale_adapter(module: nn.Module, factor: float) -> None:
    """Multiply the update of each adapter of `module` by `factor` permanently, by multiplying B.

    Raises:
        ValueError: For PiSSA, where the update is the difference to the initial values.
    """
    if attachment_of(module).config.init == "pissa":
        raise ValueError(
            "Adapters of PiSSA add the difference to their initial values, which cannot be scaled by a factor of B."
        )
    for each in adapted_weights(module):
        each.factors[1].mul_(factor)
