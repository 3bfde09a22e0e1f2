"""Counts what a model and its base get right: finds outputs and targets, and decides once what is counted."""

from lora_lightning.evaluation.changes import ChangedSample, Pairs
from lora_lightning.evaluation.confusion import Confusion
from lora_lightning.evaluation.multilabel import Labels
from lora_lightning.evaluation.paired import PairedBootstrap, mcnemar_p, paired_bootstrap
from lora_lightning.evaluation.regression import Values
from lora_lightning.evaluation.report import Report

__all__ = [
    "ChangedSample",
    "Confusion",
    "Labels",
    "PairedBootstrap",
    "Pairs",
    "Report",
    "Values",
    "mcnemar_p",
    "paired_bootstrap",
]
