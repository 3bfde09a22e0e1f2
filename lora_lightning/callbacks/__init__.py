"""Callbacks for the Trainer."""

from lora_lightning.callbacks.confusion import ConfusionReport
from lora_lightning.callbacks.lora_finetuning import LR_RATIO_IS_OF_THE_OPTIMIZER, LoRAFinetuning
from lora_lightning.callbacks.prediction_writer import PredictionWriter

__all__ = ["LR_RATIO_IS_OF_THE_OPTIMIZER", "ConfusionReport", "LoRAFinetuning", "PredictionWriter"]
