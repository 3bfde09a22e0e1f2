"""Defines `ConfusionReport`, which reports the confusion matrix of a model and its base."""

from __future__ import annotations

from typing import ClassVar

from lora_lightning.callbacks.comparison import ComparisonReport
from lora_lightning.evaluation import CLASS_TASKS


class ConfusionReport(ComparisonReport):
    """Reports the confusion matrix of a model. If the model has adapters, it also reports that of its base.

    This is `ComparisonReport` for one class per sample, pixel or token, and has the same arguments and files. For
    another task, it counts nothing and says so in a warning.
    """

    tasks: ClassVar[tuple[str, ...]] = CLASS_TASKS
