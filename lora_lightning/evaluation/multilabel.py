"""Reads several labels for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from lora_lightning.evaluation.changes import ChangedSample, Inputs, Pairs
from lora_lightning.evaluation.classes import doubt_of_constant
from lora_lightning.evaluation.reading import (
    Aligned,
    Batch,
    Context,
    Evidence,
    Reading,
    Sources,
    Tally,
    are_binary,
    both_squeezed,
    ignored_classes,
)
from lora_lightning.evaluation.report import Report
from lora_lightning.evaluation.results import mean_of_known, or_none, ratio


@dataclass(frozen=True)
class Labels:
    """Holds the counts of each label.

    Args:
        counts: True positives, false positives, false negatives and true negatives, of shape (4, K), int64.
        names: Names of the K labels.
        total: Number of samples.
        exact: Number of samples whose labels are all right.
    """

    counts: Tensor
    names: tuple[str, ...]
    total: int
    exact: int

    @cached_property
    def true_positives(self) -> list[int]:
        """Return the number of samples with the label that were found."""
        return self._counts(0)

    @cached_property
    def false_positives(self) -> list[int]:
        """Return the number of samples without the label that were taken for it."""
        return self._counts(1)

    @cached_property
    def false_negatives(self) -> list[int]:
        """Return the number of samples with the label that were missed."""
        return self._counts(2)

    @cached_property
    def true_negatives(self) -> list[int]:
        """Return the number of samples without the label that were not taken for it."""
        return self._counts(3)

    @cached_property
    def support(self) -> list[int]:
        """Return the number of samples with each label."""
        return [found + missed for found, missed in zip(self.true_positives, self.false_negatives, strict=True)]

    @cached_property
    def errors(self) -> list[int]:
        """Return the number of wrong predictions of each label."""
        return [wrong + missed for wrong, missed in zip(self.false_positives, self.false_negatives, strict=True)]

    @cached_property
    def recall(self) -> list[float]:
        """Return the recall of each label, which is NaN for a label without samples."""
        return [ratio(found, support) for found, support in zip(self.true_positives, self.support, strict=True)]

    @cached_property
    def precision(self) -> list[float]:
        """Return the precision of each label, which is NaN for a label that was never predicted."""
        return [ratio(a, a + b) for a, b in zip(self.true_positives, self.false_positives, strict=True)]

    @cached_property
    def f1(self) -> list[float]:
        """Return the harmonic mean of recall and precision of each label."""
        return [
            ratio(2 * found, 2 * found + wrong) for found, wrong in zip(self.true_positives, self.errors, strict=True)
        ]

    @cached_property
    def accuracy(self) -> float:
        """Return the fraction of samples whose labels are all right."""
        return ratio(self.exact, self.total)

    @cached_property
    def micro_f1(self) -> float:
        """Return F1 over all labels of all samples."""
        found, wrong = sum(self.true_positives), sum(self.errors)
        return ratio(2 * found, 2 * found + wrong)

    @cached_property
    def macro_f1(self) -> float:
        """Return the mean of F1 over the labels that have one."""
        return mean_of_known(self.f1)

    def summary(self) -> dict[str, float]:
        """Return the numbers of all labels together, by name."""
        return {"accuracy": self.accuracy, "micro_f1": self.micro_f1, "macro_f1": self.macro_f1}

    def table(self) -> dict[str, list[Any]]:
        """Return one column for each quantity, with a row for each label."""
        return {
            "label": list(self.names),
            "support": self.support,
            "errors": self.errors,
            "recall": self.recall,
            "precision": self.precision,
            "f1": self.f1,
            "true_positives": self.true_positives,
            "false_positives": self.false_positives,
            "false_negatives": self.false_negatives,
            "true_negatives": self.true_negatives,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON. An undefined ratio is `None`."""
        numbers: dict[str, Any] = {name: or_none(value) for name, value in self.summary().items()}
        columns = self.table()
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        labels = [
            {name: or_none(value) if isinstance(value, float) else value for name, value in row.items()} for row in rows
        ]
        return numbers | {"samples": self.total, "labels": labels}

    def _counts(self, row: int) -> list[int]:
        return [int(count) for count in self.counts[row]]


class LabelTally(Tally):
    """Counts true and false positives and negatives of each label, and the samples that are right in all labels.

    Outputs are probabilities if all of them are between 0 and 1, and logits otherwise; both are counted until the end.

    Args:
        width: Number of labels K.
        device: Device of the outputs.
    """

    def __init__(self, width: int, device: torch.device | str) -> None:
        self.width = width
        self.are_probabilities = True
        self.total = 0
        self._adapted = torch.zeros(2, 4, width, dtype=torch.int64, device=device)
        self._base: Tensor | None = None
        self._exact, self._base_exact = [0, 0], [0, 0]
        self._pairs = [Pairs(), Pairs()]

    @override
    def update(self, aligned: Aligned, base: Tensor | None, sources: Sources) -> None:
        assert aligned.counted is not None
        known = aligned.counted.any(1)
        counted, targets = aligned.counted[known], aligned.targets[known] == 1
        self.total += int(known.sum())
        self._see(aligned.outputs)
        if base is not None:
            self._see(base)
            if self._base is None:
                self._base = torch.zeros_like(self._adapted)
        inputs = None if aligned.are_parts else sources.inputs(aligned.samples[known])
        for row, threshold in enumerate((0.0, 0.5)):
            predicted = aligned.outputs[known] > threshold
            self._adapted[row] += _counts(predicted, targets, counted)
            right = ((predicted == targets) | ~counted).all(1)
            self._exact[row] += int(right.sum())
            if base is not None and self._base is not None:
                before = base[known] > threshold
                self._base[row] += _counts(before, targets, counted)
                was_right = ((before == targets) | ~counted).all(1)
                self._base_exact[row] += int(was_right.sum())
                if inputs is None:
                    self._pairs[row].count_parts(right, was_right)
                    continue
                fixed, broken = (each.nonzero()[:, 0].tolist() for each in (right & ~was_right, was_right & ~right))
                self._pairs[row].count(fixed, broken, inputs)
                labels = (targets & counted, before & counted, predicted & counted)
                _keep(self._pairs[row], fixed, broken, labels, inputs)

    @override
    def merge(self, other: Self) -> None:
        self.are_probabilities &= other.are_probabilities
        self.total += other.total
        self._adapted += other._adapted
        if other._base is not None:
            self._base = other._base if self._base is None else self._base + other._base
        for row in (0, 1):
            self._exact[row] += other._exact[row]
            self._base_exact[row] += other._base_exact[row]
            self._pairs[row].add(other._pairs[row])

    @override
    def report(self, context: Context) -> Report[Labels]:
        row = int(self.are_probabilities)
        base = None
        if self._base is not None:
            base = Labels(self._base[row].cpu(), context.names, self.total, self._base_exact[row])
        return Report(
            context.stage,
            Labels(self._adapted[row].cpu(), context.names, self.total, self._exact[row]),
            base,
            context.loader,
            None if base is None else self._pairs[row],
            "multilabel",
            context.read_as,
            metrics=context.metrics,
        )

    @property
    @override
    def number_of_names(self) -> int:
        return self.width

    @property
    @override
    def counted(self) -> int:
        return self.total

    @override
    def to_cpu(self) -> None:
        self._adapted = self._adapted.cpu()
        self._base = None if self._base is None else self._base.cpu()

    def _see(self, outputs: Tensor) -> None:
        self.are_probabilities &= bool(((outputs >= 0) & (outputs <= 1)).all())


class Multilabel(Reading[LabelTally]):
    """Reads labels of shape (B, K) or (B, K, ...) that are 0 or 1, and outputs of the same shape."""

    task = "multilabel"

    @override
    def align(self, batch: Batch) -> Aligned | None:
        outputs, targets = batch.outputs, batch.targets
        if targets.dim() < 4:
            outputs, targets = both_squeezed(batch)
        if outputs.shape != targets.shape or outputs.dim() not in (2, 4, 5) or outputs.shape[1] < 2:
            return None
        ignored = ignored_classes(targets, batch.ignore_index)
        if targets.is_floating_point():
            ignored = ignored | targets.isnan()
        if not are_binary(targets, ignored):
            return None
        targets = targets.masked_fill(ignored, 0).long()  # which metrics of torchmetrics want
        samples = torch.arange(len(targets), device=targets.device)
        if outputs.dim() > 2:
            samples = samples.repeat_interleave(targets[0, 0].numel())
            outputs, targets, ignored = (each.movedim(1, -1).flatten(0, -2) for each in (outputs, targets, ignored))
        return Aligned(
            outputs, targets, samples, ~ignored, batch.outputs.dim() > 2 and len(samples) != len(batch.targets)
        )

    @override
    def tally(self, aligned: Aligned) -> LabelTally:
        return LabelTally(aligned.width, aligned.outputs.device)

    @override
    def words(self, width: int, evidence: Evidence) -> str:
        return f"labels: {width}, from outputs {evidence.shapes()}, all 0 or 1"

    @override
    def doubt(self, evidence: Evidence, others: Sequence[str]) -> str | None:
        return doubt_of_constant(evidence, self.task, others)


def _keep(
    pairs: Pairs, fixed: list[int], broken: list[int], labels: tuple[Tensor, Tensor, Tensor], inputs: Inputs
) -> None:
    """Keep samples that only one model gets right.

    Args:
        pairs: The samples so far.
        fixed: Numbers of the rows that only the model gets right.
        broken: Numbers of the rows that only the base gets right.
        labels: The true labels, those of the base, and those of the model, each of shape (N, K).
        inputs: The inputs of the samples.
    """
    for is_fixed, numbers in ((True, fixed), (False, broken)):
        kept = numbers[: pairs.room(is_fixed)]
        if not kept:
            continue
        indices: Sequence[int | None] = inputs.indices_of(kept) or [None] * len(kept)
        samples = [
            ChangedSample(
                1,
                int(not is_fixed),
                int(is_fixed),
                0.0,
                0.0,
                **shown,
                index=index,
                labels=[each[number].nonzero()[:, 0].tolist() for each in labels],
            )
            for number, shown, index in zip(kept, inputs.of(kept), indices, strict=True)
        ]
        pairs.add(Pairs(samples=samples))


def _counts(predicted: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    pairs = (predicted & targets, predicted & ~targets, ~predicted & targets, ~predicted & ~targets)
    return torch.stack([(each & counted).sum(0) for each in pairs])
