"""Counts classes: one class for each sample, pixel or token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from lora_lightning.evaluation.changes import Changes, Predictions
from lora_lightning.evaluation.confusion import Confusion
from lora_lightning.evaluation.pair_counts import PairCounts
from lora_lightning.evaluation.paired import paired_bootstrap
from lora_lightning.evaluation.reading import Aligned, Context, Sources, Tally
from lora_lightning.evaluation.report import Report


class ClassTally(Tally):
    """Counts predictions by target class for the adapted model and the base.

    Two classes can have a single output per row: a logit, or the probability of class 1. It is a probability if all
    outputs of all devices are between 0 and 1. This is only known at the end, so both interpretations are counted until
    then.

    Args:
        width: Number of outputs per row: C, or 1 for two classes.
        device: Device of the outputs.
        are_parts: Whether a sample has several rows, such as pixels.
        task: Name of the task.
    """

    def __init__(self, width: int, device: torch.device | str, are_parts: bool = False, task: str = "classes") -> None:
        self.task = task
        self.are_parts = are_parts
        self.classes = max(width, 2)
        self.are_probabilities = width == 1
        self._interpretations = 2 if width == 1 else 1
        self._adapted = self._no_counts(device)
        self._base: list[PairCounts] | None = None
        self._changes: Changes | None = None
        self._by_sample: list[Tensor] = []
        """Difference of the accuracies of the two models on each sample with parts, by interpretation."""

    @override
    def update(self, aligned: Aligned, base: Tensor | None, sources: Sources) -> None:
        counted = aligned.counted
        targets = aligned.targets if counted is None else aligned.targets[counted]
        after = self._predictions(aligned.outputs, counted)
        self._count(self._adapted, after, targets)
        if base is None:
            return
        if self._base is None:
            self._base, self._changes = self._no_counts(targets.device), Changes()
        assert self._changes is not None
        before = self._predictions(base, counted)
        self._count(self._base, before, targets)
        samples = aligned.samples if counted is None else aligned.samples[counted]
        self._changes.compare(after, before, targets, None if self.are_parts else sources.inputs(samples))
        if self.are_parts and len(samples):
            gained = (after.classes == targets).int() - (before.classes == targets).int()
            size, rows = int(samples.max()) + 1, torch.bincount(samples)
            sums = torch.zeros(len(gained), size, dtype=torch.int64, device=samples.device)
            sums.index_add_(1, samples, gained.long())
            sums, rows = sums.cpu(), rows.cpu()
            self._by_sample.append((sums.double() / rows)[:, rows > 0])

    @override
    def merge(self, other: Self) -> None:
        self.are_probabilities &= other.are_probabilities
        for mine, theirs in zip(self._adapted, other._adapted, strict=True):
            mine.merge(theirs)
        if self._base is None:
            self._base = other._base
        else:
            for mine, theirs in zip(self._base, other._base or (), strict=False):
                mine.merge(theirs)
        if other._changes is not None:
            self._changes = self._changes or Changes()
            self._changes.merge(other._changes)
        self._by_sample += other._by_sample

    @override
    def report(self, context: Context) -> Report[Confusion]:
        base = None if self._base is None else Confusion(self._chosen(self._base), context.names)
        pairs = None if self._changes is None else self._changes.pairs()
        test = None
        if self._by_sample:
            test = paired_bootstrap(torch.cat(self._by_sample, 1)[self._interpretation(len(self._by_sample[0]))])
        return Report(
            context.stage,
            Confusion(self._chosen(self._adapted), context.names),
            base,
            context.loader,
            pairs,
            self.task,
            context.read_as,
            test,
            context.metrics,
        )

    @property
    @override
    def number_of_names(self) -> int:
        return self.classes

    @property
    @override
    def counted(self) -> int:
        return self._adapted[0].total

    @override
    def to_cpu(self) -> None:
        for each in (*self._adapted, *(self._base or ())):
            each.to_cpu()

    def _no_counts(self, device: torch.device | str) -> list[PairCounts]:
        return [PairCounts(self.classes, device) for _ in range(self._interpretations)]

    def _predictions(self, outputs: Tensor, counted: Tensor | None) -> Predictions:
        found = Predictions.of(outputs, counted)
        if self.are_probabilities:
            self.are_probabilities = found.can_be_probabilities
        return found

    def _count(self, counts: list[PairCounts], predictions: Predictions, targets: Tensor) -> None:
        for each, predicted in zip(counts, predictions.classes, strict=True):
            each.add(targets, predicted)

    def _interpretation(self, available: int) -> int:
        return available - 1 if self.are_probabilities else 0

    def _chosen(self, counts: list[PairCounts]) -> Tensor:
        return counts[self._interpretation(len(counts))].matrix()


def named_classes(width: int, kind: str, shapes: str, of: Sequence[str] = ()) -> str:
    """Return what is counted in words.

    Args:
        width: Number of outputs per row.
        kind: What the classes are of: `classes`, `tokens`, ....
        shapes: Shapes of the outputs and targets, in words.
        of: Further remarks.
    """
    outputs = "one output" if width == 1 else "logits"
    return ", ".join([f"{kind}: {max(width, 2)}", f"from {outputs} {shapes}", *of])
