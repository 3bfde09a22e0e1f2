"""Holds the predictions of a model on one split of the data, and counts the errors on the classes in focus."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import override

from lora_lightning.evaluation import Confusion, mcnemar_p


@dataclass(frozen=True)
class Tally:
    """Holds the numbers of errors with respect to the classes in focus.

    Args:
        focus_errors: Number of misclassified samples of these classes.
        other_errors: Number of misclassified samples of all other classes.
        false_positives: Number of samples in `other_errors` that were predicted as a class in focus.
        total: Number of all samples.
    """

    focus_errors: int
    other_errors: int
    false_positives: int
    total: int

    @property
    def errors(self) -> int:
        return self.focus_errors + self.other_errors

    @property
    def accuracy(self) -> float:
        return 1 - self.errors / self.total


@dataclass(frozen=True)
class Predictions:
    """Holds the logits and targets of all samples of one split.

    Args:
        logits: Logits of shape (N, C).
        targets: Class indices of shape (N,), int64.
    """

    logits: Tensor
    targets: Tensor

    @cached_property
    def classes(self) -> Tensor:
        """Return the predicted classes, of shape (N,)."""
        return self.logits.argmax(1)

    def tally(self, focus: tuple[int, ...]) -> Tally:
        """Count errors for these classes in focus."""
        wrong = self.classes != self.targets
        inside, taken = (torch.isin(classes, torch.tensor(focus)) for classes in (self.targets, self.classes))
        counts = [int(chosen.sum()) for chosen in (wrong & inside, wrong & ~inside, taken & ~inside)]
        return Tally(counts[0], counts[1], counts[2], len(self.targets))

    def confusion(self, class_names: tuple[str, ...]) -> Confusion:
        """Return the confusion matrix."""
        size = len(class_names)
        return Confusion(
            torch.bincount(self.targets * size + self.classes, minlength=size**2).view(size, size), class_names
        )

    def of_classes(self, classes: tuple[int, ...]) -> Predictions:
        """Return the predictions for the samples of these classes."""
        chosen = torch.isin(self.targets, torch.tensor(classes))
        return Predictions(self.logits[chosen], self.targets[chosen])

    def biased(self, bias: Tensor) -> Predictions:
        """Return the predictions with a bias of shape (C,) added to the logits."""
        return Predictions(self.logits + bias, self.targets)


def mcnemar(before: Predictions, after: Predictions) -> float:
    """Return the two-sided p-value of McNemar's exact test for equal error rates of two models."""
    was, now = (model.classes == model.targets for model in (before, after))
    return mcnemar_p(int((~was & now).sum()), int((was & ~now).sum()))


class PredictionCollector(Callback):
    """Collects the outputs of the steps of `Classifier` in validation or test."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(outputs)

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(outputs)

    def _collect(self, outputs: STEP_OUTPUT) -> None:
        assert isinstance(outputs, Mapping)
        self._parts.append((outputs["logits"].float().cpu(), outputs["targets"].cpu()))

    def predictions(self) -> Predictions:
        """Return the collected outputs and clear them."""
        logits, targets = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        self._parts = []
        return Predictions(logits, targets)
