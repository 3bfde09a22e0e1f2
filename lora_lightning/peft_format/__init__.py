"""Adapter folders in the format of PEFT."""

from lora_lightning.peft_format.folder import AdapterFolder, load_adapter, save_adapter, trained_on

__all__ = ["AdapterFolder", "load_adapter", "save_adapter", "trained_on"]
