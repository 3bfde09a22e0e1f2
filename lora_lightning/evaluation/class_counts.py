"""Counts classes: one class for each sample, pixel or token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from lora_lightning.evaluation.changes import Changes
from lora_lightning.evaluation.confusion import Confusion
from lora_lightning.evaluation.paired import paired_bootstrap
from lora_lightning.evaluation.reading import Aligned, Context, Sources, Tally
from lora_lightning.evaluation.report import Report

_SMALL_MATRIX = 256


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
        self._adapted = self._zeros(device)
        self._base: Tensor | None = None
        self._changes: Changes | None = None
        self._by_sample: list[Tensor] = []
        """Difference of the accuracies of the two models on each sample with parts, by interpretation."""

    @override
    def update(self, aligned: Aligned, base: Tensor | None, sources: Sources) -> None:
        counted = aligned.counted
        outputs, targets, samples = aligned.outputs[counted], aligned.targets[counted], aligned.samples[counted]
        predicted = self._predicted(outputs)
        self._count(self._adapted, predicted, targets)
        if base is None:
            return
        base = base[counted]
        if self._base is None:
            self._base, self._changes = self._zeros(outputs.device), Changes()
        assert self._changes is not None
        before = self._predicted(base)
        self._count(self._base, before, targets)
        self._changes.update(outputs, base, targets, None if self.are_parts else sources.inputs(samples))
        if self.are_parts and len(samples):
            gained = (predicted == targets).int() - (before == targets).int()
            size, rows = int(samples.max()) + 1, torch.bincount(samples)
            sums = torch.zeros(len(gained), size, dtype=torch.int64, device=samples.device)
            sums.index_add_(1, samples, gained.long())
            sums, rows = sums.cpu(), rows.cpu()
            self._by_sample.append((sums.double() / rows)[:, rows > 0])

    @override
    def merge(self, other: Self) -> None:
        self.are_probabilities &= other.are_probabilities
        self._adapted += other._adapted
        if other._base is not None:
            self._base = other._base if self._base is None else self._base + other._base
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
        return int(self._adapted[0].sum())

    @override
    def to_cpu(self) -> None:
        self._adapted = self._adapted.cpu()
        self._base = None if self._base is None else self._base.cpu()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another device, with the counts of many classes as those that are not zero."""
        state = dict(vars(self))
        for name in ("_adapted", "_base"):
            if self.classes > _SMALL_MATRIX and state[name] is not None:
                state[name] = state[name].to_sparse()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        for name in ("_adapted", "_base"):
            if state[name] is not None and state[name].is_sparse:
                state[name] = state[name].to_dense()
        vars(self).update(state)

    def _zeros(self, device: torch.device | str) -> Tensor:
        return torch.zeros(self._interpretations, self.classes**2, dtype=torch.int64, device=device)

    def _predicted(self, outputs: Tensor) -> Tensor:
        """Return the predicted classes of shape (interpretations, N)."""
        if outputs.dim() > 1:
            return outputs.argmax(1)[None]
        self.are_probabilities &= bool(((outputs >= 0) & (outputs <= 1)).all())
        return torch.stack((outputs > 0, outputs > 0.5)).long()

    def _count(self, counts: Tensor, predicted: Tensor, targets: Tensor) -> None:
        places = targets * self.classes + predicted
        for row, of_interpretation in zip(counts, places, strict=True):
            row.index_add_(0, of_interpretation, torch.ones_like(of_interpretation))

    def _interpretation(self, available: int) -> int:
        return available - 1 if self.are_probabilities else 0

    def _chosen(self, counts: Tensor) -> Tensor:
        chosen = counts[self._interpretation(len(counts))]
        return chosen.view(self.classes, self.classes).cpu()


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
