"""Defines modules and networks to train."""

from lora_lightning.models.backbones import image_backbone
from lora_lightning.models.classifier import Classifier
from lora_lightning.models.one_cycle import OneCycle
from lora_lightning.models.rich_boy_net import RichBoyNet
from lora_lightning.models.text_backbone import text_backbone

__all__ = [
    "Classifier",
    "OneCycle",
    "RichBoyNet",
    "image_backbone",
    "text_backbone",
]
