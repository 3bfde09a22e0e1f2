"""Lists the tasks. A further one is a file with a subclass of `Reading`, and a line here."""

from __future__ import annotations

from typing import Any

from lora_lightning.evaluation.classes import Binary, Classes, OneHot
from lora_lightning.evaluation.multilabel import Multilabel
from lora_lightning.evaluation.reading import Reading
from lora_lightning.evaluation.regression import Regression
from lora_lightning.evaluation.segmentation import BinaryParts, ClassesLast, OneHotParts, Segmentation
from lora_lightning.evaluation.tokens import BinaryTokens, NextTokens, Tokens

READINGS: tuple[Reading[Any], ...] = (
    *(Classes(), OneHot(), Binary()),
    *(NextTokens(), Tokens(), BinaryTokens()),
    *(Segmentation(), ClassesLast(), OneHotParts(), BinaryParts()),
    Multilabel(),
    Regression(),
)
"""All readings. Of several that fit all batches, the first one is right, unless it doubts."""

TASKS = tuple(dict.fromkeys(reading.task for reading in READINGS))
CLASS_TASKS = ("classes", "next_tokens", "tokens", "segmentation")
"""The tasks whose result is a confusion matrix."""
