"""Where batches come from."""

from lora_lightning.data.in_memory import InMemoryDataset, stratified_split
from lora_lightning.data.mnist import MNISTDataModule
from lora_lightning.data.samplers import ReplaySampler, ShuffledSampler

__all__ = ["InMemoryDataset", "MNISTDataModule", "ReplaySampler", "ShuffledSampler", "stratified_split"]
