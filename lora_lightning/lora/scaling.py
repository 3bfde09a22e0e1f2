"""Scales the updates of adapters: W + λ ΔW."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lora_lightning.lora.record import adapted_weights, attachment_of


@contextmanager
def scaled(module: nn.Module, factor: float) -> Iterator[None]:
    """Multiply the update of each active adapter of `module` by `factor` within this context.

    0 gives the base, and 1 has no effect. Contexts may overlap, and their factors are multiplied. With DoRA, the change
    of the norms is scaled as well.
    """
    adapters, key = [weight.adapter for weight in adapted_weights(module)], object()
    try:
        for adapter in adapters:
            adapter.scaled(key, factor)
        yield
    finally:
        for adapter in adapters:
            adapter.scaled(key, None)


@torch.no_grad()
def scale_adapter(module: nn.Module, factor: float) -> None:
    """Multiply the update of each active adapter of `module` by `factor` permanently.

    Raises:
        ValueError: For PiSSA, where the update is the difference to the initial values.
    """
    attachment_of(module)
    for weight in adapted_weights(module):
        weight.adapter.scale(factor, weight.dense_weight())
