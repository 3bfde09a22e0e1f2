"""Counts the predictions of a model by class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix


class Counts:
    """Counts predictions by target class on this device, and sums them over all devices.

    Two classes can have a single output per sample: a logit, or the probability of class 1. It is a probability if all outputs of all
    devices are between 0 and 1. This is only known at the end, so both interpretations are counted until then.

    Args:
        outputs: Number of outputs per sample: C, or 1 for two classes.
        device: Device of the outputs.
        group: The processes with different samples, or `None` for all.
    """

    def __init__(self, outputs: int, device: torch.device | str, group: Any = None) -> None:
        self.outputs, self.samples, self.are_probabilities = outputs, 0, outputs == 1
        num_classes = max(outputs, 2)
        self._counters = [
            MulticlassConfusionMatrix(num_classes, validate_args=False, process_group=group).to(device)
            for _ in range(2 if outputs == 1 else 1)
        ]
        self._add(torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.int64, device=device))

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: logits of shape (N, C), or (N,) for two classes, and targets of shape (N,)."""
        if logits.dim() > 1:
            self._add(logits.argmax(1), targets)
            return
        self._add((logits > 0).long(), targets, (logits > 0.5).long())
        self.are_probabilities &= bool(((logits >= 0) & (logits <= 1)).all())

    def matrix(self) -> Tensor:
        """Return the counts of all devices, of shape (C, C), on the CPU. Every device has to call this."""
        counts: Tensor = self._counters[int(self.are_probabilities)].compute()
        return counts.cpu()

    def _add(self, predicted: Tensor, targets: Tensor, predicted_at_half: Tensor | None = None) -> None:
        for counter, classes in zip(self._counters, (predicted, predicted_at_half), strict=False):
            counter.update(predicted if classes is None else classes, targets)


def sum_over_devices(
    counts: Mapping[Any, Counts], device: torch.device, group: Any = None
) -> dict[Any, tuple[Tensor, int]]:
    """Return the matrix and the number of samples over all devices by key.

    Every device has to call this, including devices without samples that do not know the number of classes.
    """
    own = {key: (each.outputs, each.are_probabilities, each.samples) for key, each in counts.items()}
    devices = [own]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        devices = [own] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(devices, own, group)
    summed = {}
    for key in sorted({key for each in devices for key in each}):
        known = [each[key] for each in devices if key in each]
        found = counts.get(key) or Counts(known[0][0], device, group)
        found.are_probabilities = all(are_probabilities for _, are_probabilities, _ in known)
        summed[key] = found.matrix(), sum(samples for _, _, samples in known)
    return summed
