"""A short sweep over learning rates."""

from lora_lightning.find_lr.factor import LearningRateFactor
from lora_lightning.find_lr.found import FoundRate, Trial
from lora_lightning.find_lr.sweep import find_learning_rate

__all__ = ["FoundRate", "LearningRateFactor", "Trial", "find_learning_rate"]
