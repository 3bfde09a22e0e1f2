"""Reads one class for each token of a text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from typing_extensions import override

from lora_lightning.evaluation.class_counts import ClassTally, named_classes
from lora_lightning.evaluation.classes import binary_rows
from lora_lightning.evaluation.reading import (
    NO_TARGET,
    Aligned,
    Batch,
    Evidence,
    Reading,
    are_classes,
    rows_of,
    squeezed,
)


class Tokens(Reading[ClassTally]):
    """Reads class numbers of shape (B, L) and logits of shape (B, L, C)."""

    task = "tokens"

    @override
    def align(self, batch: Batch) -> Aligned | None:
        outputs, targets = batch.outputs, batch.targets
        if outputs.dim() != 3 or targets.shape != outputs.shape[:2] or outputs.shape[2] < 2:
            return None
        return rows_of(outputs, targets, batch, outputs.shape[2]) if are_classes(targets, outputs.shape[2]) else None

    @override
    def tally(self, aligned: Aligned) -> ClassTally:
        return ClassTally(aligned.width, aligned.outputs.device, aligned.are_parts, self.task)

    @override
    def words(self, width: int, evidence: Evidence) -> str:
        return named_classes(width, "classes of tokens", evidence.shapes())

    @override
    def doubt(self, evidence: Evidence, others: Sequence[str]) -> str | None:
        if "segmentation" not in others:
            return None
        return 'two dimensions are equal: set task to "tokens" if the classes are last, or to "segmentation"'


class NextTokens(Tokens):
    """Reads the following token: the logits of a position are compared with the target one further."""

    task = "next_tokens"

    @override
    def align(self, batch: Batch) -> Aligned | None:
        outputs, targets = batch.outputs, batch.targets
        if not batch.is_next_token or outputs.dim() != 3 or targets.shape != outputs.shape[:2]:
            return None
        if not are_classes(targets, outputs.shape[2]):
            return None
        # The targets are shifted, since a copy of the logits could be large. The last position has none.
        targets = nn.functional.pad(targets.long()[:, 1:], (0, 1), value=NO_TARGET)
        return rows_of(outputs, targets, batch, outputs.shape[2])

    @override
    def words(self, width: int, evidence: Evidence) -> str:
        return named_classes(width, "next tokens", evidence.shapes(), ["shifted by one"])

    @override
    def doubt(self, evidence: Evidence, others: Sequence[str]) -> str | None:
        return None


class BinaryTokens(Tokens):
    """Reads targets of tokens that are 0 or 1, and a single output per token."""

    @override
    def align(self, batch: Batch) -> Aligned | None:
        outputs = squeezed(batch.outputs) if batch.outputs.dim() == 3 else batch.outputs
        if not batch.is_per_token or batch.targets.dim() != 2 or outputs.shape != batch.targets.shape:
            return None
        return binary_rows(outputs, batch.targets, batch)

    @override
    def doubt(self, evidence: Evidence, others: Sequence[str]) -> str | None:
        return None
