"""Computes metrics per class from a confusion matrix."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from math import isnan
from typing import Any

import torch
from torch import Tensor

from lora_lightning.report.changes import Pairs

SHOWN_CLASSES = 20
"""Maximum number of classes in tables, figures and scalars, which contain those with the lowest recall. Files contain all."""
_DENSE_CLASSES = 100


@dataclass(frozen=True)
class Confusion:
    """Holds the exact counts of one model on one data set.

    Args:
        matrix: Counts of shape (C, C), int64, on the CPU. Rows are target classes, and columns are predicted classes.
        class_names: Names of the C classes.
    """

    matrix: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        size = len(self.class_names)
        if tuple(self.matrix.shape) != (size, size):
            raise ValueError(
                f"The confusion matrix has the shape {tuple(self.matrix.shape)}, but there are {size} class names."
            )

    @cached_property
    def total(self) -> int:
        """Return the number of samples."""
        return int(self.matrix.sum())

    @cached_property
    def correct(self) -> list[int]:
        """Return the number of correctly classified samples of each class."""
        return [int(count) for count in self.matrix.diagonal()]

    @cached_property
    def support(self) -> list[int]:
        """Return samples of each class."""
        return [int(count) for count in self.matrix.sum(1)]

    @cached_property
    def errors(self) -> list[int]:
        """Return the number of misclassified samples of each class."""
        return [support - correct for support, correct in zip(self.support, self.correct, strict=True)]

    @cached_property
    def recall(self) -> list[float]:
        """Return the recall of each class, which is NaN for a class without samples."""
        return [_ratio(correct, support) for correct, support in zip(self.correct, self.support, strict=True)]

    @cached_property
    def precision(self) -> list[float]:
        """Return the precision of each class, which is NaN for a class that was never predicted."""
        predicted = [int(count) for count in self.matrix.sum(0)]
        return [_ratio(correct, count) for correct, count in zip(self.correct, predicted, strict=True)]

    @cached_property
    def accuracy(self) -> float:
        """Return the fraction of correctly classified samples, which is NaN without samples."""
        return _ratio(sum(self.correct), self.total)

    @cached_property
    def false_positives(self) -> list[int]:
        """Return the number of false positives of each class."""
        return [int(count) - correct for count, correct in zip(self.matrix.sum(0), self.correct, strict=True)]

    @cached_property
    def f1(self) -> list[float]:
        """Return the harmonic mean of recall and precision of each class, which is NaN for a class without samples and predictions."""
        counts = zip(self.correct, self.errors, self.false_positives, strict=True)
        return [_ratio(2 * correct, 2 * correct + errors + others) for correct, errors, others in counts]

    def weakest(self) -> int:
        """Return the first class with the lowest recall among those with samples."""
        known = [index for index, support in enumerate(self.support) if support]
        return min(known, key=lambda index: self.recall[index])

    def shown(self) -> list[int]:
        """Return the classes to show: all, or for more than 20 classes the 20 with the lowest recall that have samples."""
        classes = range(len(self.class_names))
        if len(classes) <= SHOWN_CLASSES:
            return list(classes)
        known = [index for index in classes if self.support[index]]
        return sorted(known, key=lambda index: (self.recall[index], -self.errors[index]))[:SHOWN_CLASSES]

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON. An undefined ratio is `None`.

        For more than 100 classes, `matrix` is `None`, and `counts` lists `[target, predicted, count]` for non-zero counts.
        """
        dense = len(self.class_names) <= _DENSE_CLASSES
        places = self.matrix.nonzero()
        counts = torch.cat([places, self.matrix[places[:, :1], places[:, 1:]]], dim=1)
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
                    "f1": _or_none(self.f1[index]),
                    "false_positives": self.false_positives[index],
                }
                for index, name in enumerate(self.class_names)
            ],
            "matrix": self.matrix.tolist() if dense else None,
            **({} if dense else {"counts": counts.tolist()}),
        }


@dataclass(frozen=True)
class Report:
    """Holds the counts of one pass over the data for the model and, if it has adapters, for its base.

    Args:
        stage: `"test"` or `"val"`.
        model: Counts of the model.
        base: Counts of the model with disabled adapters, or `None` for a model without adapters.
        loader: Number of the data loader, if there are several.
        pairs: The samples that only one of the two models classifies correctly, or `None` without a base.
    """

    stage: str
    model: Confusion
    base: Confusion | None = None
    loader: int | None = None
    pairs: Pairs | None = None

    @property
    def suffix(self) -> str:
        """Return Lightning's suffix for the names of this data loader, which is empty for a single one."""
        return "" if self.loader is None else f"/dataloader_idx_{self.loader}"

    def metrics(self) -> dict[str, float]:
        """Return `test/recall/9`, `test/precision/9` and, for the base, `test/base_recall/9`, ..., for the shown classes."""
        found = {}
        for prefix, confusion in {"": self.model, "base_": self.base}.items():
            for ratio in ("recall", "precision") if confusion else ():
                for index in self.model.shown():
                    name, value = loggable(self.model.class_names[index]), getattr(confusion, ratio)[index]
                    if not isnan(value):
                        found[f"{self.stage}/{prefix}{ratio}/{name}{self.suffix}"] = value
        return found


def loggable(name: str) -> str:
    """Return the name of a class with underscores for characters that some loggers refuse."""
    return re.sub(r"[^\w\-. ]", "_", name)


def _ratio(count: int, total: int) -> float:
    return count / total if total else float("nan")


def _or_none(value: float) -> float | None:
    return None if isnan(value) else value
