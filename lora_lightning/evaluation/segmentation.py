"""Reads one class for each pixel, or other part of a sample."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from lora_lightning.evaluation.class_counts import ClassTally, named_classes
from lora_lightning.evaluation.classes import are_one_hot, binary_rows, doubt_of_constant
from lora_lightning.evaluation.reading import (
    Aligned,
    Batch,
    Evidence,
    Reading,
    are_classes,
    both_squeezed,
    rows_of,
)


class Segmentation(Reading[ClassTally]):
    """Reads class numbers of shape (B, ...) and logits of shape (B, C, ...), as PyTorch's losses do."""

    task = "segmentation"

    @override
    def align(self, batch: Batch) -> Aligned | None:
        outputs, targets = batch.outputs, batch.targets
        if targets.dim() == outputs.dim() > 2 and targets.shape[1] == 1:
            targets = targets.squeeze(1)
        if outputs.dim() < 3 or (batch.is_text and outputs.dim() == 3) or outputs.shape[1] < 2:
            return None
        num_classes = outputs.shape[1]
        if targets.shape != outputs.shape[:1] + outputs.shape[2:] or not are_classes(targets, num_classes):
            return None
        return rows_of(outputs.movedim(1, -1), targets, batch, num_classes)

    @override
    def tally(self, aligned: Aligned) -> ClassTally:
        return ClassTally(aligned.width, aligned.outputs.device, aligned.are_parts, self.task)

    @override
    def words(self, width: int, evidence: Evidence) -> str:
        return named_classes(width, "classes of pixels or other parts", evidence.shapes())


class ClassesLast(Segmentation):
    """Reads class numbers of shape (B, H, W, ...) and logits of shape (B, H, W, ..., C)."""

    @override
    def align(self, batch: Batch) -> Aligned | None:
        outputs, targets = batch.outputs, batch.targets
        if outputs.dim() < 4 or targets.shape != outputs.shape[:-1] or outputs.shape[-1] < 2:
            return None
        num_classes = outputs.shape[-1]
        return rows_of(outputs, targets, batch, num_classes) if are_classes(targets, num_classes) else None


class OneHotParts(Segmentation):
    """Reads targets of shape (B, C, ...) with a single 1 for each part, and logits of the same shape."""

    @override
    def align(self, batch: Batch) -> Aligned | None:
        outputs, targets = batch.outputs, batch.targets
        if outputs.dim() < 4 or outputs.shape != targets.shape or not are_one_hot(targets, 1):
            return None
        return rows_of(outputs.movedim(1, -1), targets.long().argmax(1), batch, outputs.shape[1])


class BinaryParts(Segmentation):
    """Reads targets of shape (B, ...) that are 0 or 1, and a single output for each."""

    @override
    def align(self, batch: Batch) -> Aligned | None:
        has_axis = batch.outputs.dim() > 2 and 1 in (batch.outputs.shape[1], batch.outputs.shape[-1])
        outputs, targets = both_squeezed(batch)
        if outputs.shape != targets.shape or not (has_axis or batch.outputs.dim() == 3) or batch.outputs.dim() < 3:
            return None
        return binary_rows(outputs, targets, batch)

    @override
    def doubt(self, evidence: Evidence, others: Sequence[str]) -> str | None:
        return doubt_of_constant(evidence, self.task, others)
