"""Counts what a model and its base get right: finds outputs and targets, and decides once what is counted."""

from lora_lightning.evaluation.changes import ChangedSample, Pairs
from lora_lightning.evaluation.confusion import SHOWN_CLASSES, Confusion
from lora_lightning.evaluation.datasets import names_of_classes
from lora_lightning.evaluation.evaluation import Evaluation, EvaluationSettings
from lora_lightning.evaluation.found import described, find_targets, tensors_of
from lora_lightning.evaluation.multilabel import Labels
from lora_lightning.evaluation.paired import PairedBootstrap, mcnemar_p, paired_bootstrap
from lora_lightning.evaluation.regression import ValueChanges, Values
from lora_lightning.evaluation.report import Report
from lora_lightning.evaluation.results import Compared, or_none
from lora_lightning.evaluation.tasks import CLASS_TASKS, TASKS

__all__ = [
    "CLASS_TASKS",
    "SHOWN_CLASSES",
    "TASKS",
    "ChangedSample",
    "Compared",
    "Confusion",
    "Evaluation",
    "EvaluationSettings",
    "Labels",
    "PairedBootstrap",
    "Pairs",
    "Report",
    "ValueChanges",
    "Values",
    "described",
    "find_targets",
    "mcnemar_p",
    "names_of_classes",
    "or_none",
    "paired_bootstrap",
    "tensors_of",
]
