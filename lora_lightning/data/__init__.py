"""Data modules, data sets and samplers."""

from lora_lightning.data.image_folder import ImageFolderDataModule
from lora_lightning.data.mnist import MNISTDataModule
from lora_lightning.data.samplers import LengthGroupedSampler, ReplaySampler, ShuffledSampler
from lora_lightning.data.text import TextDataModule

__all__ = [
    "ImageFolderDataModule",
    "LengthGroupedSampler",
    "MNISTDataModule",
    "ReplaySampler",
    "ShuffledSampler",
    "TextDataModule",
]
