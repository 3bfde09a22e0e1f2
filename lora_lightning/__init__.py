"""LoRA for PyTorch Lightning: fine-tune any model with a few thousand parameters, and see class by class what that changed."""

from lora_lightning import lora
from lora_lightning.callbacks import ConfusionReport, FeatureCache, LoRAFinetuning, PredictionWriter
from lora_lightning.data import ImageFolderDataModule, MNISTDataModule, TextDataModule
from lora_lightning.lora import LoRAConfig
from lora_lightning.models import Classifier, RichBoyNet, image_backbone, text_backbone
from lora_lightning.peft_format import load_adapter, save_adapter

__version__ = "0.1.0"

__all__ = [
    "Classifier",
    "ConfusionReport",
    "FeatureCache",
    "ImageFolderDataModule",
    "LoRAConfig",
    "LoRAFinetuning",
    "MNISTDataModule",
    "PredictionWriter",
    "RichBoyNet",
    "TextDataModule",
    "image_backbone",
    "load_adapter",
    "lora",
    "save_adapter",
    "text_backbone",
]
