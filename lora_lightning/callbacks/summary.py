"""Describes the trained parameters and metrics of a run."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from torch import nn

from lora_lightning.lora import AdaptedWeight, adapted_weights
from lora_lightning.lora.modules_to_save import shared_memory
from lora_lightning.lora.state import adapter_keys


def what_trains(adapted: nn.Module, is_fit: bool) -> str:
    """Return one line per adapter, one line per adapted weight that another layer shares, and the total.

    Args:
        adapted: The adapted network.
        is_fit: Whether they are trained now, as the last line says.
    """
    lines = ["LoRA adapters on:"]
    for weight in adapted_weights(adapted):
        size = sum(value.numel() for value in weight.adapter.parameters())
        lines.append(
            f"  {weight.title or type(adapted).__name__}: {_sizes(weight)}, rank {weight.rank}, scale "
            f"{weight.adapter.scaling:g}, {size:,} parameters{'' if weight.is_trained else ', frozen'}"
        )
    memory = shared_memory(adapted)
    for weight in {weight.name: weight for weight in adapted_weights(adapted)}.values():
        if len(names := memory.get(id(weight.weight), ())) > 1:
            lines.append(
                f"  {weight.name} shares its weight ({', '.join(names)}): the adapter only affects {weight.name}."
            )
    lines.append(f"{'Trained' if is_fit else 'Adapters'}: {trained_parameters(adapted)}.")
    return "\n".join(lines)


def _sizes(weight: AdaptedWeight) -> str:
    a, b = weight.factors
    sizes = f"{a.shape[-1]} -> {len(b)}"
    return f"{a.shape[1]} experts of {sizes}" if weight.layout.experts else sizes


def trained_parameters(adapted: nn.Module) -> str:
    """Return the number of trained parameters: `6,794 parameters, 0.242% of the 2,807,010 that are frozen`."""
    return in_words(*trained_and_total(adapted))


def in_words(trained: int, total: int) -> str:
    """Return the numbers of trained parameters and of all as words."""
    if trained == total:
        return f"all {total:,} parameters"
    return f"{trained:,} parameters, {trained / (total - trained):.3%} of the {total - trained:,} that are frozen"


def trained_and_total(module: nn.Module) -> tuple[int, int]:
    """Return the number of trained parameters of a module, and of all but those of adapters that are not trained."""
    of_adapters = adapter_keys(module)
    sizes = [
        (parameter.numel(), parameter.requires_grad)
        for key, parameter in module.named_parameters()
        if parameter.requires_grad or key not in of_adapters
    ]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def stage_metrics(trainer: Trainer, stage: str) -> dict[str, float]:
    """Return the metrics of the last `"val"` or `"test"`, except those of single classes.

    Their names are without `val/` or `val_`.
    """
    found = {
        name[len(stage) + 1 :]: float(value) for name, value in trainer.callback_metrics.items() if _is_of(stage, name)
    }
    return {name: value for name, value in found.items() if "/" not in name and math.isfinite(value)}


def _is_of(stage: str, name: str) -> bool:
    return name.startswith((f"{stage}/", f"{stage}_"))
