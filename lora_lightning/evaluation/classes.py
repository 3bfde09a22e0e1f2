"""Reads one class for each sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lora_lightning.evaluation.class_counts import ClassTally, named_classes
from lora_lightning.evaluation.reading import (
    Aligned,
    Batch,
    Evidence,
    Reading,
    are_binary,
    are_classes,
    both_squeezed,
    ignored_classes,
    rows_of,
)


class Classes(Reading[ClassTally]):
    """Reads class numbers of shape (B,) and logits of shape (B, C)."""

    task = "classes"

    @override
    def align(self, batch: Batch) -> Aligned | None:
        outputs, targets = both_squeezed(batch)
        if outputs.dim() != 2 or targets.dim() != 1 or len(outputs) != len(targets):
            return None
        num_classes = outputs.shape[1]
        return rows_of(outputs, targets, batch, num_classes) if are_classes(targets, num_classes) else None

    @override
    def outputs_of_base(self, batch: Batch) -> Tensor | None:
        outputs, targets = both_squeezed(batch)
        return outputs if len(outputs) == len(targets) else None

    @override
    def tally(self, aligned: Aligned) -> ClassTally:
        return ClassTally(aligned.width, aligned.outputs.device)

    @override
    def words(self, width: int, evidence: Evidence) -> str:
        return named_classes(width, "classes", evidence.shapes())


class OneHot(Classes):
    """Reads rows of shape (B, C) with a single 1 each, and logits of the same shape."""

    @override
    def align(self, batch: Batch) -> Aligned | None:
        outputs, targets = both_squeezed(batch)
        if outputs.dim() != 2 or outputs.shape != targets.shape or not are_one_hot(targets, 1):
            return None
        return rows_of(outputs, targets.long().argmax(1), batch, outputs.shape[1])

    @override
    def words(self, width: int, evidence: Evidence) -> str:
        return named_classes(width, "classes", evidence.shapes(), ["one-hot in every row"])


class Binary(Classes):
    """Reads targets of shape (B,) that are 0 or 1, and a single output per sample."""

    @override
    def align(self, batch: Batch) -> Aligned | None:
        outputs, targets = both_squeezed(batch)
        if outputs.dim() != 1 or outputs.shape != targets.shape:
            return None
        return binary_rows(outputs, targets, batch)

    @override
    def words(self, width: int, evidence: Evidence) -> str:
        return named_classes(width, "classes", evidence.shapes(), ["all 0 or 1"])

    @override
    def doubt(self, evidence: Evidence, others: Sequence[str]) -> str | None:
        return doubt_of_constant(evidence, self.task, others)


def binary_rows(outputs: Tensor, targets: Tensor, batch: Batch) -> Aligned | None:
    """Return single outputs and targets that are all 0 or 1 as rows, or `None` if the targets are others."""
    if not are_binary(targets, ignored_classes(targets, batch.ignore_index)):
        return None
    return rows_of(outputs, targets, batch, 2)


def are_one_hot(targets: Tensor, axis: int) -> bool:
    """Return whether the targets are 0 or 1, with a single 1 along an axis."""
    if targets.shape[axis] < 2 or not are_binary(targets, torch.zeros_like(targets, dtype=torch.bool)):
        return False
    return bool((targets.long().sum(axis) == 1).all())


def doubt_of_constant(evidence: Evidence, task: str, others: Sequence[str]) -> str | None:
    """Return a question if all targets are the same float, which may be a class or a value."""
    if evidence.kind != "float" or len(evidence.values) > 1 or "regression" not in others:
        return None
    value = next(iter(evidence.values), 0.0)
    return f'all targets are {value:g}: set task to "{task}" or "regression"'
