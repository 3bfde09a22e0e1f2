"""What a confusion matrix says, class by class."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Confusion:
    """Exact counts of one model on one data set.

    Args:
        matrix: Shape (C, C), int64, on the CPU. Row: target class; column: predicted class.
        class_names: C names.
    """

    matrix: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        size = len(self.class_names)
        if tuple(self.matrix.shape) != (size, size):
            raise ValueError(f"A confusion matrix of shape {tuple(self.matrix.shape)} for {size} class names.")

    @property
    def total(self) -> int:
        """Number of samples."""
        return int(self.matrix.sum())

    @property
    def correct(self) -> list[int]:
        """Samples of each class that were recognised."""
        return [int(count) for count in self.matrix.diagonal()]

    @property
    def support(self) -> list[int]:
        """Samples of each class."""
        return [int(count) for count in self.matrix.sum(1)]

    @property
    def errors(self) -> list[int]:
        """Samples of each class that were taken for another."""
        return [support - correct for support, correct in zip(self.support, self.correct, strict=True)]

    @property
    def recall(self) -> list[float]:
        """Share of each class that was recognised; NaN for a class without samples."""
        return [_ratio(correct, support) for correct, support in zip(self.correct, self.support, strict=True)]

    @property
    def precision(self) -> list[float]:
        """Share of the predictions of each class that were right; NaN for a class never predicted."""
        predicted = [int(count) for count in self.matrix.sum(0)]
        return [_ratio(correct, count) for correct, count in zip(self.correct, predicted, strict=True)]

    @property
    def accuracy(self) -> float:
        """Share of all samples that were recognised; NaN without samples."""
        return _ratio(sum(self.correct), self.total)

    def weakest(self) -> int:
        """The class with the lowest recall, among those that have samples; the first of them in a tie."""
        known = [index for index, support in enumerate(self.support) if support]
        return min(known, key=lambda index: self.recall[index])

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; a ratio that is not defined is `None`."""
        return {
            "accuracy": _or_none(self.accuracy),
            "errors": sum(self.errors),
            "classes": [
                {
                    "name": name,
                    "support": self.support[index],
                    "errors": self.errors[index],
                    "recall": _or_none(self.recall[index]),
                    "precision": _or_none(self.precision[index]),
                }
                for index, name in enumerate(self.class_names)
            ],
            "matrix": self.matrix.tolist(),
        }


@dataclass(frozen=True)
class Report:
    """The counts of one pass over the data: of the model and, if it has adapters, of its base beside it.

    Args:
        stage: `"test"` or `"val"`.
        model: The model as it is.
        base: The same model with its adapters disabled; `None` for a model without adapters.
    """

    stage: str
    model: Confusion
    base: Confusion | None = None


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _or_none(value: float) -> float | None:
    return None if isnan(value) else value
