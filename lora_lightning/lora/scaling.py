"""Scales what adapters add: W + λ ΔW."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lora_lightning.lora.model import adapted_weights, attachment_of


@contextmanager
def scaled(module: nn.Module, factor: float) -> Iterator[None]:
    """Multiply what each adapter of `module` adds by `factor` within this context: 0 is the base, 1 changes nothing."""
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
    """Multiply what each adapter of `module` adds by `factor`, for good: B becomes `factor` times B.

    Raises:
        ValueError: For adapters of PiSSA, which add the difference to a start.
    """
    if attachment_of(module).config.init == "pissa":
        raise ValueError("Adapters of PiSSA add the difference to their start, which no factor of B scales.")
    for each in adapted_weights(module):
        each.factors[1].mul_(factor)
