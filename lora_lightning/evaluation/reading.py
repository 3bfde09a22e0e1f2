"""Defines what a task is: ways to read outputs and targets, and what is counted of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from lora_lightning.evaluation.changes import Inputs
from lora_lightning.evaluation.report import Report
from lora_lightning.evaluation.results import Compared

NO_TARGET = -100
"""Target of a sample that does not count: the default `ignore_index` of PyTorch's losses."""
_MOST_VALUES = 2


@dataclass(frozen=True)
class Batch:
    """Holds what a model returned for a batch, and what is true.

    Args:
        outputs: Tensor of shape (B, ...).
        targets: Tensor of shape (B, ...).
        ignore_index: Target to ignore, in addition to -100 for classes.
        is_text: Whether the inputs are texts, so that the second dimension of three is a position in the text.
        is_per_token: Whether there is a target for each token of the inputs.
        is_next_token: Whether the model predicts the following token, so that the target of a position is one further.
    """

    outputs: Tensor
    targets: Tensor
    ignore_index: int | None = None
    is_text: bool = False
    is_per_token: bool = False
    is_next_token: bool = False

    def with_outputs(self, outputs: Tensor) -> Batch:
        """Return the same batch with the outputs of another model."""
        return replace(self, outputs=outputs)


@dataclass(frozen=True)
class Aligned:
    """Holds outputs and targets in a common form.

    Args:
        outputs: Scores of shape (..., C), whose first dimensions are those of N rows, or (N,) for a single one. For
            labels and values, their shape is that of the targets.
        targets: Classes of shape (N,), or labels or values of shape (N, K).
        samples: Number of the sample in its batch, of shape (N,).
        counted: Which of the targets count, of their shape, or `None` for all.
        are_parts: Whether a sample has several rows, such as pixels.
        strange: Targets that are no class.
    """

    outputs: Tensor
    targets: Tensor
    samples: Tensor
    counted: Tensor | None
    are_parts: bool = False
    strange: tuple[int, ...] = ()

    def without_repeated(self, first_time: Sequence[bool] | None) -> Aligned:
        """Return the rows, of which those of repeated samples do not count."""
        if first_time is None:
            return self
        new = torch.tensor(first_time, device=self.samples.device)[self.samples]
        new = (new if self.targets.dim() == 1 else new[:, None]).expand_as(self.targets)
        return replace(self, counted=new if self.counted is None else self.counted & new)

    @property
    def width(self) -> int:
        """Return the number of outputs of a row."""
        return self.outputs.shape[-1] if self.outputs.dim() > 1 else 1


@dataclass
class Evidence:
    """Collects what is known about the outputs and targets of all batches."""

    kind: str = ""
    outputs_shape: tuple[int | None, ...] = ()
    targets_shape: tuple[int | None, ...] = ()
    values: frozenset[float] = frozenset()
    """The values of the targets, up to three of them."""
    are_whole: bool = True
    are_shares: bool = True
    """Whether each sample has several targets of 0 to 1 whose sum is 1."""
    strange: frozenset[int] = frozenset()

    def add(self, batch: Batch, aligned: Aligned) -> None:
        """Add a batch."""
        values, are_whole = self.values, self.are_whole
        may_be_fractions = are_whole and aligned.targets.is_floating_point()
        if len(values) <= _MOST_VALUES or may_be_fractions:
            known = aligned.targets if aligned.counted is None else aligned.targets[aligned.counted]
            if len(values) <= _MOST_VALUES and known.numel():
                values |= frozenset(_distinct(known.flatten()[:: max(1, known.numel() // 64)]))
                if len(values) <= _MOST_VALUES:
                    values |= frozenset(_distinct(known))
            if may_be_fractions:
                are_whole = bool((known == known.round()).all())
        are_shares = self.are_shares and aligned.targets.dim() == 2 and aligned.targets.is_floating_point()
        if are_shares:
            rows = aligned.targets.float()
            are_shares = bool(((rows >= 0).all(1) & ((rows.sum(1) - 1).abs() < 1e-3)).all())
        found = Evidence(
            _kind(batch.targets),
            (None, *batch.outputs.shape[1:]),
            (None, *batch.targets.shape[1:]),
            values,
            are_whole,
            are_shares,
            frozenset(aligned.strange),
        )
        self.merge(found)

    def merge(self, other: Evidence) -> None:
        """Add what another device knows."""
        self.kind = self.kind or other.kind
        self.outputs_shape = _common(self.outputs_shape, other.outputs_shape)
        self.targets_shape = _common(self.targets_shape, other.targets_shape)
        self.values |= other.values
        self.are_whole &= other.are_whole
        self.are_shares &= other.are_shares
        self.strange |= other.strange

    def shapes(self) -> str:
        """Return a description: `(B, 5) and integer targets (B)`."""
        return f"{_letters(self.outputs_shape)} and {self.kind} targets {_letters(self.targets_shape)}"


@dataclass
class Context:
    """Names what a report needs beside the counts.

    Args:
        stage: `"test"` or `"val"`.
        names: Names of the classes, labels or values, if any.
        loader: Number of the data loader, if there are several.
        read_as: What is counted, in words.
        metrics: The user's metrics: of the adapted model and of the base.
    """

    stage: str
    names: tuple[str, ...]
    loader: int | None = None
    read_as: str = ""
    metrics: dict[str, Compared] = field(default_factory=dict)


@dataclass(frozen=True)
class Sources:
    """Tells where the samples of a batch come from.

    Args:
        batch: The batch, with the inputs.
        decode: A function that decodes token ids, if there is one.
        indices: Index in the data set of each sample, or `None` if it is not known.
        first_time: Which samples are counted for the first time, or `None` for all.
    """

    batch: object = None
    decode: Callable[[Tensor], list[str]] | None = None
    indices: Sequence[int] | None = None
    first_time: Sequence[bool] | None = None

    def inputs(self, samples: Tensor) -> Inputs:
        """Return the inputs of rows, given the number of their sample in the batch."""
        return Inputs(self.batch, samples, self.decode, self.indices)


class Tally(ABC):
    """Counts the rows of all batches for the adapted model and the base."""

    @abstractmethod
    def update(self, aligned: Aligned, base: Tensor | None, sources: Sources) -> None:
        """Count a batch.

        Args:
            aligned: Outputs of the adapted model, and the targets.
            base: Outputs of the base in the same form, or `None` without a base.
            sources: Where the samples come from.
        """

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Add the counts of another device, in the order of the devices."""

    @abstractmethod
    def report(self, context: Context) -> Report:
        """Return the report."""

    @property
    @abstractmethod
    def number_of_names(self) -> int:
        """Return the number of classes, labels or values that may have names."""

    def to_cpu(self) -> None:  # noqa: B027 - most hold their counts there
        """Move the counts to the CPU, so that they can be sent to other devices."""

    @property
    @abstractmethod
    def counted(self) -> int:
        """Return the number of rows that were counted."""


TallyT = TypeVar("TallyT", bound=Tally)


class Reading(ABC, Generic[TallyT]):
    """Reads outputs and targets in one way."""

    task: ClassVar[str]
    """Name of the task, as `task=` of `ComparisonReport` takes it."""

    @abstractmethod
    def align(self, batch: Batch) -> Aligned | None:
        """Return the outputs and targets in a common form, or `None` if this batch can not be read so."""

    def outputs_of_base(self, batch: Batch) -> Tensor | None:
        """Return the outputs of the base for targets that were aligned before, in the same form, or `None`."""
        aligned = self.align(batch)
        return None if aligned is None else aligned.outputs

    @abstractmethod
    def tally(self, aligned: Aligned) -> TallyT:
        """Return a new tally for outputs and targets like these."""

    @abstractmethod
    def words(self, width: int, evidence: Evidence) -> str:
        """Return what is counted, in words: `classes: 5, from logits (B, 5) and integer targets (B)`."""

    def doubt(self, evidence: Evidence, others: Sequence[str]) -> str | None:
        """Return what can not be known, or `None`.

        Args:
            evidence: What is known of all batches.
            others: The tasks of the other readings that fit all batches.
        """
        return None


def squeezed(tensor: Tensor) -> Tensor:
    """Return a tensor without dimensions of size one, except the first, which is that of the batch."""
    if not tensor.dim():
        return tensor[None]
    if 1 not in tensor.shape[1:]:
        return tensor
    return tensor.reshape(tensor.shape[0], *(size for size in tensor.shape[1:] if size != 1))


def both_squeezed(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the outputs and targets without dimensions of size one. Outputs without a batch dimension get one."""
    outputs, targets = batch.outputs, squeezed(batch.targets)
    if outputs.dim() == 1 and targets.shape == (1,) and outputs.shape != targets.shape:
        outputs = outputs[None]  # a model that squeezes its output, and a batch of one sample
    elif outputs.dim() and len(targets) == 1 and outputs.shape == targets.shape[1:]:
        outputs = outputs[None]
    return squeezed(outputs), targets


def are_classes(targets: Tensor, num_classes: int) -> bool:
    """Return whether the targets may be numbers of classes. Floats may only if all are valid classes or ignored."""
    if targets.dtype == torch.bool or not targets.is_floating_point():
        return not targets.is_complex()
    ignored = targets == NO_TARGET
    return bool(((targets == targets.round()) & (targets >= 0) & (targets < num_classes) | ignored).all())


def are_binary(targets: Tensor, ignored: Tensor) -> bool:
    """Return whether the targets that are not ignored are 0 or 1."""
    return bool(((targets == 0) | (targets == 1) | ignored).all())


def ignored_classes(targets: Tensor, ignore_index: int | None) -> Tensor:
    """Return where a target is -100 or `ignore_index`."""
    ignored = targets == NO_TARGET
    return ignored if ignore_index is None else ignored | (targets == ignore_index)


def rows_of(outputs: Tensor, targets: Tensor, batch: Batch, num_classes: int) -> Aligned:
    """Return classes of any shape as rows.

    Args:
        outputs: Scores of shape (B, ..., C), or (B, ...) for two classes.
        targets: Classes of shape (B, ...).
        batch: The batch.
        num_classes: Number of classes C, or 2.
    """
    parts = targets.shape[1:].numel()
    samples = torch.arange(len(targets), device=targets.device)
    if parts != 1:
        samples = samples.repeat_interleave(parts)
    flat = targets.flatten()
    scores = outputs if outputs.dim() > targets.dim() else outputs.flatten()
    if batch.ignore_index is None and _are_valid(flat, num_classes):  # which takes less time than what follows
        return Aligned(scores, flat.long(), samples, None, targets.dim() > 1)
    ignored = ignored_classes(flat, batch.ignore_index)
    valid = (flat >= 0) & (flat < num_classes)
    strange = torch.unique(flat[~valid & ~ignored])[:100].long().tolist() if not bool((valid | ignored).all()) else ()
    return Aligned(scores, flat.long(), samples, valid & ~ignored, targets.dim() > 1, tuple(strange))


def _are_valid(targets: Tensor, num_classes: int) -> bool:
    if targets.dtype == torch.bool or not targets.numel():
        return True
    low, high = torch.aminmax(targets)
    return float(low) >= 0 and float(high) < num_classes


def _distinct(values: Tensor) -> list[float]:
    """Return the first different values, up to three."""
    found: Tensor = torch.unique(values)
    return [float(each) for each in found[: _MOST_VALUES + 1].tolist()]


def _kind(targets: Tensor) -> str:
    if targets.dtype == torch.bool:
        return "boolean"
    return "float" if targets.is_floating_point() else "integer"


def _common(first: tuple[int | None, ...], second: tuple[int | None, ...]) -> tuple[int | None, ...]:
    if not first or len(first) != len(second):
        return first or second
    return tuple(a if a == b else None for a, b in zip(first, second, strict=True))


def _letters(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join(str(size) if size is not None else "BLMN"[min(i, 3)] for i, size in enumerate(shape)) + ")"
