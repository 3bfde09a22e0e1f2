"""What joins a Trainer."""

from lora_lightning.callbacks.adapter_checkpoint import AdapterCheckpointIO
from lora_lightning.callbacks.confusion import ConfusionReport
from lora_lightning.callbacks.lora_finetuning import LoRAFinetuning

__all__ = ["AdapterCheckpointIO", "ConfusionReport", "LoRAFinetuning"]
