"""Adapter folders in the format of PEFT."""

from lora_lightning.peft_format.folder import load_adapter, save_adapter

__all__ = [
    "load_adapter",
    "save_adapter",
]
