"""LoRA for PyTorch Lightning: fine-tune any model with a few thousand parameters, and see what changed by class."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lightning import lora
    from lora_lightning.callbacks import ComparisonReport, ConfusionReport, LoRAFinetuning, PredictionWriter
    from lora_lightning.data import ImageFolderDataModule, MNISTDataModule, TextDataModule
    from lora_lightning.find_lr import find_learning_rate
    from lora_lightning.lora import LoRAConfig
    from lora_lightning.models import Classifier, RichBoyNet, image_backbone, text_backbone
    from lora_lightning.peft_format import load_adapter, save_adapter

__version__ = "0.1.0"

__all__ = [
    "Classifier",
    "ComparisonReport",
    "ConfusionReport",
    "ImageFolderDataModule",
    "LoRAConfig",
    "LoRAFinetuning",
    "MNISTDataModule",
    "PredictionWriter",
    "RichBoyNet",
    "TextDataModule",
    "find_learning_rate",
    "image_backbone",
    "load_adapter",
    "lora",
    "save_adapter",
    "text_backbone",
]

_PACKAGES = {
    "callbacks": ("ComparisonReport", "ConfusionReport", "LoRAFinetuning", "PredictionWriter"),
    "data": ("ImageFolderDataModule", "MNISTDataModule", "TextDataModule"),
    "find_lr": ("find_learning_rate",),
    "lora": ("LoRAConfig",),
    "models": ("Classifier", "RichBoyNet", "image_backbone", "text_backbone"),
    "peft_format": ("load_adapter", "save_adapter"),
}


def __getattr__(name: str) -> Any:
    """Import a public name on first access.

    Then `lora_lightning.lora` only imports PyTorch, and `--version` imports nothing.
    """
    if name == "lora":
        return import_module("lora_lightning.lora")
    for package, names in _PACKAGES.items():
        if name in names:
            return getattr(import_module(f"lora_lightning.{package}"), name)
    raise AttributeError(f"module 'lora_lightning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
