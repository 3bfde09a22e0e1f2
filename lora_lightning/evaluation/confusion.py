"""Computes metrics per class from a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isnan
from typing import Any

import torch
from torch import Tensor

from lora_lightning.evaluation.pair_counts import MOST_DENSE
from lora_lightning.evaluation.results import all_loggable, mean_of_known, or_none, ratio

SHOWN_CLASSES = 20
"""Maximum number of classes in tables, figures and scalars: those with the lowest recall. Files contain all."""
QUANTITIES = ("errors", "recall", "precision", "f1", "iou", "false_positives")
"""Names what is known of each class, beside its support."""
_DENSE_CLASSES = 100


@dataclass(frozen=True)
class Confusion:
    """Holds the exact counts of one model on one data set.

    Args:
        matrix: Counts of shape (C, C), int64, on the CPU. Rows are target classes, and columns are predicted classes.
            For more than 2,048 classes, it is a sparse tensor.
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
    def cells(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the targets, the predictions and the counts of the cells that are not zero, each of shape (N,)."""
        if self.matrix.is_sparse:
            matrix = self.matrix.coalesce()
            targets, predicted = matrix.indices()
            return targets, predicted, matrix.values()
        targets, predicted = self.matrix.nonzero(as_tuple=True)
        return targets, predicted, self.matrix[targets, predicted]

    def mistakes(self) -> dict[tuple[int, int], int]:
        """Return the counts of wrong predictions by target and prediction, without those that did not occur."""
        targets, predicted, counts = (found.tolist() for found in self.cells)
        cells = zip(targets, predicted, counts, strict=True)
        return {(target, taken): count for target, taken, count in cells if target != taken}

    def of_classes(self, shown: Sequence[int]) -> Tensor:
        """Return the counts of these classes as a dense matrix, with a last row and column for all others, if any."""
        classes = len(self.class_names)
        size = len(shown) + (len(shown) < classes)
        place = torch.full((classes,), size - 1)
        place[list(shown)] = torch.arange(len(shown))
        targets, predicted, counts = self.cells
        found = torch.zeros(size, size, dtype=torch.int64)
        return found.index_put_((place[targets], place[predicted]), counts, accumulate=True)

    @property
    def has_many_classes(self) -> bool:
        """Return whether there are more than 100 classes, whose counts have a file of their own."""
        return len(self.class_names) > _DENSE_CLASSES

    @cached_property
    def total(self) -> int:
        """Return the number of samples."""
        return int(self.cells[2].sum())

    @cached_property
    def correct(self) -> list[int]:
        """Return the number of correctly classified samples of each class."""
        targets, predicted, counts = self.cells
        return self._sums(targets, counts * (targets == predicted))

    @cached_property
    def support(self) -> list[int]:
        """Return samples of each class."""
        return self._sums(self.cells[0], self.cells[2])

    @cached_property
    def predicted(self) -> list[int]:
        """Return the number of predictions of each class."""
        return self._sums(self.cells[1], self.cells[2])

    @cached_property
    def errors(self) -> list[int]:
        """Return the number of misclassified samples of each class."""
        return [support - correct for support, correct in zip(self.support, self.correct, strict=True)]

    @cached_property
    def recall(self) -> list[float]:
        """Return the recall of each class, which is NaN for a class without samples."""
        return [ratio(correct, support) for correct, support in zip(self.correct, self.support, strict=True)]

    @cached_property
    def precision(self) -> list[float]:
        """Return the precision of each class, which is NaN for a class that was never predicted."""
        return [ratio(correct, count) for correct, count in zip(self.correct, self.predicted, strict=True)]

    @cached_property
    def accuracy(self) -> float:
        """Return the fraction of correctly classified samples, which is NaN without samples."""
        return ratio(sum(self.correct), self.total)

    @cached_property
    def false_positives(self) -> list[int]:
        """Return the number of false positives of each class."""
        return [count - correct for count, correct in zip(self.predicted, self.correct, strict=True)]

    @cached_property
    def f1(self) -> list[float]:
        """Return the harmonic mean of recall and precision of each class, which is NaN for one that never occurs."""
        counts = zip(self.correct, self.errors, self.false_positives, strict=True)
        return [ratio(2 * correct, 2 * correct + errors + others) for correct, errors, others in counts]

    @cached_property
    def iou(self) -> list[float]:
        """Return the intersection over union of each class, which is NaN for one that never occurs."""
        counts = zip(self.correct, self.errors, self.false_positives, strict=True)
        return [ratio(correct, correct + errors + others) for correct, errors, others in counts]

    @cached_property
    def mean_iou(self) -> float:
        """Return the mean intersection over union of the classes that have one."""
        return mean_of_known(self.iou)

    @cached_property
    def mean_recall(self) -> float:
        """Return the mean recall of the classes with samples."""
        return mean_of_known(self.recall)

    def summary(self) -> dict[str, float]:
        """Return the numbers of all classes together, by name."""
        return {"accuracy": self.accuracy, "mean_recall": self.mean_recall, "mean_iou": self.mean_iou}

    def table(self) -> dict[str, list[Any]]:
        """Return one column for each quantity, with a row for each class."""
        columns: dict[str, list[Any]] = {"class": list(self.class_names), "support": self.support}
        return columns | {name: getattr(self, name) for name in QUANTITIES}

    def recall_to_log(self) -> dict[str, float]:
        """Return the recall of each class with samples as `recall/<class>`, or of more than 20 their mean."""
        recalls = zip(all_loggable(self.class_names), self.recall, strict=True)
        known = {f"recall/{name}": recall for name, recall in recalls if not isnan(recall)}
        return {"mean_recall": self.mean_recall} if len(known) > SHOWN_CLASSES else known

    def weakest(self) -> int:
        """Return the first class with the lowest recall among those with samples."""
        known = [index for index, support in enumerate(self.support) if support]
        return min(known, key=lambda index: self.recall[index])

    def shown(self) -> list[int]:
        """Return the classes to show: all, or of more than 20 those 20 with samples and the lowest recall."""
        classes = range(len(self.class_names))
        if len(classes) <= SHOWN_CLASSES:
            return list(classes)
        known = [index for index in classes if self.support[index]]
        return sorted(known, key=lambda index: (self.recall[index], -self.errors[index]))[:SHOWN_CLASSES]

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON. An undefined ratio is `None`.

        For more than 100 classes, `matrix` is `None`. For more than 2,048, `classes` lists only those with samples or
        predictions.
        """
        classes = list(range(len(self.class_names)))
        if len(classes) > MOST_DENSE:
            classes = [index for index in classes if self.support[index] or self.predicted[index]]
        return {
            "accuracy": or_none(self.accuracy),
            "errors": sum(self.errors),
            "classes": [
                {
                    "name": self.class_names[index],
                    "support": self.support[index],
                    "errors": self.errors[index],
                    "recall": or_none(self.recall[index]),
                    "precision": or_none(self.precision[index]),
                    "f1": or_none(self.f1[index]),
                    "iou": or_none(self.iou[index]),
                    "false_positives": self.false_positives[index],
                }
                for index in classes
            ],
            "matrix": None if self.has_many_classes else self.matrix.tolist(),
        }

    def _sums(self, places: Tensor, counts: Tensor) -> list[int]:
        sums = torch.zeros(len(self.class_names), dtype=torch.int64).index_add_(0, places, counts)
        return [int(each) for each in sums.tolist()]
