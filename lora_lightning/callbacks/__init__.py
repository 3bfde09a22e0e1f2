"""What joins a Trainer."""

from lora_lightning.callbacks.adapter_checkpoint import AdapterCheckpointIO
from lora_lightning.callbacks.atomic_checkpoint import AtomicCheckpointIO
from lora_lightning.callbacks.confusion import ConfusionReport
from lora_lightning.callbacks.frozen_prefix import FrozenPrefixCache
from lora_lightning.callbacks.lora_finetuning import LoRAFinetuning
from lora_lightning.callbacks.predictions import Predictions
from lora_lightning.callbacks.random_state import RandomState

__all__ = [
    "AdapterCheckpointIO",
    "AtomicCheckpointIO",
    "ConfusionReport",
    "FrozenPrefixCache",
    "LoRAFinetuning",
    "Predictions",
    "RandomState",
]
