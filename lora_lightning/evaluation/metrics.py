"""Computes the user's metrics of torchmetrics for the adapted model and its base."""

from __future__ import annotations

from typing import Any, Self

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lora_lightning.evaluation.reading import Aligned
from lora_lightning.evaluation.results import Compared


class UserMetrics:
    """Holds the user's metrics for the adapted model and its base.

    Args:
        collection: The metrics. It is copied, and not changed.
        device: Device of the outputs.
    """

    def __init__(self, collection: MetricCollection, device: torch.device | str = "cpu") -> None:
        self._collection = collection
        self._adapted, self._base = (collection.clone().to(device) for _ in range(2))
        for each in (self._adapted, self._base):
            each.reset()
        self._has_base = False
        self.error: str | None = None

    def copy(self, device: torch.device | str) -> Self:
        """Return new metrics of the same kind on a device."""
        return type(self)(self._collection, device)

    def update(self, aligned: Aligned, base: Tensor | None) -> None:
        """Add a batch. An error is kept, and ends these metrics, not the run."""
        if self.error is not None:
            return
        targets = aligned.targets
        outputs = _by_row(aligned.outputs, targets)
        of_base = None if base is None else _by_row(base, targets)
        if aligned.counted is not None:
            rows = aligned.counted if targets.dim() == 1 else aligned.counted.all(1)
            outputs, targets = outputs[rows], targets[rows]
            of_base = None if of_base is None else of_base[rows]
        if targets.dim() == 2 and targets.shape[1] == 1:
            outputs, targets = outputs[:, 0], targets[:, 0]
            of_base = None if of_base is None else of_base[:, 0]
        if not len(targets):
            return
        try:
            self._adapted.update(outputs, targets)
            if of_base is not None:
                self._has_base = True
                self._base.update(of_base, targets)
        except Exception as error:  # noqa: BLE001 - a metric that does not fit must not cost the run
            self.error = f"{type(error).__name__}: {error}"

    def compute(self, group: Any = None) -> dict[str, Compared]:
        """Return the values by name, of the adapted model and of the base. Every device has to call this."""
        states = [(self.error, self._has_base)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states *= torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(states, (self.error, self._has_base), group)
        errors = [error for error, _ in states if error is not None]
        if errors:
            rank_zero_warn(f"The metrics are not computed: {errors[0]}")
            return {}
        try:
            adapted = _numbers(self._adapted.compute())
            base = _numbers(self._base.compute()) if any(has for _, has in states) else {}
        except Exception as error:  # noqa: BLE001 - the same
            rank_zero_warn(f"The metrics are not computed: {type(error).__name__}: {error}")
            return {}
        return {name: Compared(value, base.get(name)) for name, value in adapted.items()}


def collection_of(metrics: MetricCollection | Metric | None) -> MetricCollection | None:
    """Return metrics as a collection."""
    return MetricCollection([metrics]) if isinstance(metrics, Metric) else metrics


def _by_row(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.flatten(0, -2) if outputs.dim() > targets.dim() else outputs


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Return single numbers, and those of a vector by their position."""
    found: dict[str, float] = {}
    for name, value in values.items():
        flat = torch.as_tensor(value).flatten().tolist()
        found |= (
            {name: float(flat[0])} if len(flat) == 1 else {f"{name}_{i}": float(each) for i, each in enumerate(flat)}
        )
    return found
