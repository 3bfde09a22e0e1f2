"""Callbacks for the Trainer."""

from lora_lightning.callbacks.adapter_writer import AdapterWriter
from lora_lightning.callbacks.comparison import ComparisonReport
from lora_lightning.callbacks.confusion import ConfusionReport
from lora_lightning.callbacks.finite_adapters import FiniteAdapters
from lora_lightning.callbacks.frozen_base import FrozenBase
from lora_lightning.callbacks.lora_finetuning import LoRAFinetuning
from lora_lightning.callbacks.prediction_writer import PredictionWriter

__all__ = [
    "AdapterWriter",
    "ComparisonReport",
    "ConfusionReport",
    "FiniteAdapters",
    "FrozenBase",
    "LoRAFinetuning",
    "PredictionWriter",
]
