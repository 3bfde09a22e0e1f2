"""Defines a data set of images that are decoded on access."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lora_lightning.data.augmentation import seed_of_sample
from lora_lightning.data.images import read_image

Transform = Callable[[Any], Any]
ImageBatch = Tensor | tuple[Tensor, Tensor]
"""Images, with class indices if there are any."""


class ImageDataset(Dataset[ImageBatch]):
    """Returns full batches of preprocessed images of shape (B, C, H, W), and class indices of shape (B,) if available.

    Args:
        files: The image files.
        targets: Class index of each file, or `None` for images to predict.
        preprocessing: A deterministic function from an RGB image to a tensor of shape (C, H, W).
        augmentation: A transform that is applied first. Its random numbers are a function of the seed of the run, the
            epoch and the index of the image.
        in_memory: Whether to keep decoded images in memory. Without augmentation, preprocessed images are kept.
    """

    def __init__(
        self,
        files: Sequence[Path],
        targets: Sequence[int] | None,
        preprocessing: Transform,
        augmentation: Transform | None = None,
        in_memory: bool = False,
    ) -> None:
        self.files = list(files)
        self.targets = None if targets is None else torch.tensor(targets, dtype=torch.long)
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.in_memory = in_memory
        self.epoch = 0
        self._images: dict[int, Image.Image] = {}
        self._tensors: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> ImageBatch:
        batch = self.__getitems__([index])
        return batch[0] if isinstance(batch, Tensor) else (batch[0][0], batch[1][0])

    def __getitems__(self, indices: Sequence[int]) -> ImageBatch:
        """Return a full batch. `DataLoader` calls this once instead of `__getitem__` for each sample."""
        # A device without samples gets an empty batch of the right shape.
        inputs = self._stack(indices) if indices else self._stack([0])[:0]
        return inputs if self.targets is None else (inputs, self.targets[torch.tensor(indices, dtype=torch.long)])

    def preprocess_by(self, preprocessing: Transform) -> None:
        """Change the preprocessing, for another backbone."""
        if preprocessing is not self.preprocessing:
            self.preprocessing = preprocessing
            self._tensors = {}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the augmentations."""
        self.epoch = epoch

    def _stack(self, indices: Sequence[int]) -> Tensor:
        samples = [self._sample(index) for index in indices]
        shapes = {tuple(sample.shape) for sample in samples}
        if len(shapes) > 1:
            first = samples[0].shape
            other = next(index for index, sample in zip(indices, samples, strict=True) if sample.shape != first)
            raise ValueError(
                f"After preprocessing, {self.files[indices[0]]} and {self.files[other]} have different shapes "
                f"({', '.join(map(str, sorted(shapes)))}). Add a crop of a fixed size at the end of the preprocessing."
            )
        return torch.stack(samples)

    def _sample(self, index: int) -> Tensor:
        if self.augmentation is None:
            return self._preprocessed(index)
        image = self._decoded(index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of_sample(self.epoch, index))
            augmented = self.augmentation(image)
        return self._to_tensor(augmented, index)

    def _preprocessed(self, index: int) -> Tensor:
        if index in self._tensors:
            return self._tensors[index]
        tensor = self._to_tensor(read_image(self.files[index]), index)
        if self.in_memory:
            self._tensors[index] = tensor
        return tensor

    def _decoded(self, index: int) -> Image.Image:
        if index in self._images:
            return self._images[index]
        image = read_image(self.files[index])
        if self.in_memory:
            self._images[index] = image
        return image

    def _to_tensor(self, image: Any, index: int) -> Tensor:
        tensor = self.preprocessing(image)
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"The preprocessing returned a {type(tensor).__name__} for {self.files[index]}; expected a tensor of "
                "shape (C, H, W). Add torchvision.transforms.v2.ToImage and ToDtype at its end."
            )
        return tensor
