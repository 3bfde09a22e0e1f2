"""LoRA for PyTorch Lightning: fine-tune any classifier with a few thousand parameters, and see what that changed."""

from lora_lightning.callbacks import ConfusionReport, FrozenPrefixCache, LoRAFinetuning, Predictions
from lora_lightning.data import ImageFolderDataModule, MNISTDataModule
from lora_lightning.lora import (
    LoRAConfig,
    adapter_names,
    adapter_parameters,
    adapter_state,
    attach,
    combine_adapters,
    detach,
    disabled,
    extract,
    fingerprint,
    is_adapted,
    load_adapter,
    lora_plus,
    low_rank,
    merge,
    merged,
    save_adapter,
    switch_adapter,
    verify,
)
from lora_lightning.models import Classifier, RichBoyNet, image_backbone

__version__ = "0.1.0"

__all__ = [
    "Classifier",
    "ConfusionReport",
    "FrozenPrefixCache",
    "ImageFolderDataModule",
    "LoRAConfig",
    "LoRAFinetuning",
    "MNISTDataModule",
    "Predictions",
    "RichBoyNet",
    "adapter_names",
    "adapter_parameters",
    "adapter_state",
    "attach",
    "combine_adapters",
    "detach",
    "disabled",
    "extract",
    "fingerprint",
    "image_backbone",
    "is_adapted",
    "load_adapter",
    "lora_plus",
    "low_rank",
    "merge",
    "merged",
    "save_adapter",
    "switch_adapter",
    "verify",
]
