"""Callbacks for the Trainer."""

from lora_lightning.callbacks.comparison import ComparisonReport
from lora_lightning.callbacks.confusion import ConfusionReport
from lora_lightning.callbacks.lora_finetuning import LoRAFinetuning
from lora_lightning.callbacks.prediction_writer import PredictionWriter

__all__ = [
    "ComparisonReport",
    "ConfusionReport",
    "LoRAFinetuning",
    "PredictionWriter",
]
