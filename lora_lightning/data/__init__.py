"""Where batches come from."""

from lora_lightning.data.image_folder import ImageFolderDataModule
from lora_lightning.data.in_memory import InMemoryDataset, stratified_split
from lora_lightning.data.mnist import MNISTDataModule
from lora_lightning.data.samplers import ReplaySampler, ShuffledSampler

__all__ = [
    "ImageFolderDataModule",
    "InMemoryDataset",
    "MNISTDataModule",
    "ReplaySampler",
    "ShuffledSampler",
    "stratified_split",
]
