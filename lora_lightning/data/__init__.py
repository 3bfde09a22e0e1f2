"""Data modules, data sets and samplers."""

from lora_lightning.data.focus import check_share
from lora_lightning.data.image_folder import ImageFolderDataModule
from lora_lightning.data.in_memory import InMemoryDataset, stratified_split
from lora_lightning.data.mnist import MNISTDataModule
from lora_lightning.data.mnist_files import Source
from lora_lightning.data.samplers import LengthGroupedSampler, ReplaySampler, ShuffledSampler
from lora_lightning.data.text import TextDataModule
from lora_lightning.data.text_files import read_texts

__all__ = [
    "ImageFolderDataModule",
    "InMemoryDataset",
    "LengthGroupedSampler",
    "MNISTDataModule",
    "ReplaySampler",
    "ShuffledSampler",
    "Source",
    "TextDataModule",
    "check_share",
    "read_texts",
    "stratified_split",
]
