"""`MNISTDataModule`: MNIST, whole or as a sample, filtered by digit or mixed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from lora_lightning.data.augmentation import jitter
from lora_lightning.data.focus import as_list, check_share, replay_sampler
from lora_lightning.data.in_memory import InMemoryDataset, full_batches, stratified_split
from lora_lightning.data.mnist_files import Source, prepare, read
from lora_lightning.data.module import ResumableDataModule
from lora_lightning.data.samplers import ShuffledSampler
from lora_lightning.resume.loader import ResumableLoader

MEAN, STD = 0.1307, 0.3081
"""These are the mean and deviation of MNIST's training pixels, scaled to 0 to 1."""


class MNISTDataModule(ResumableDataModule):
    """MNIST as batches of images (B, 1, 28, 28), float32, normalized, and digits (B,), int64.

    The images lie in memory as uint8; a batch is indexed at once, moved to the device and normalized there.

    Args:
        data_dir: Folder in which torchvision keeps MNIST (`<data_dir>/MNIST/raw`).
        source: `"full"`, the 70,000 digits, downloaded by torchvision if missing; `"sample"`, 5,000 of them that come
            with the package; `"auto"`, full where it is on disk or can be downloaded, else the sample. Once set up, the
            attribute `source` says which of the two is in use.
        digits: Train on these digits alone. Validation and test keep all ten.
        focus: Train on batches that hold a fixed share of these digits, the rest from all others (replay).
        focus_fraction: That share.
        augment: Change training images at random, on the device: `lora_lightning.data.augmentation.jitter`.
        eval_digits: Validate, test and predict on these digits alone.
        batch_size: Training samples in a batch, on each device.
        eval_batch_size: Samples in a batch of validation, test and prediction, on each device.
        val_fraction: Part of the training digits that is held out for validation, the same share of every class;
            0 trains on all of them and leaves nothing to validate on.
        split_seed: Determines which. It is not the seed of a run, so that two runs agree on what was held out.
        download: Whether a missing database may be downloaded.

    Raises:
        ValueError: If a value is out of its range.

    Example::

        data = MNISTDataModule(source="sample", focus=[9], batch_size=100)
        trainer.fit(Classifier(RichBoyNet()), datamodule=data)
    """

    class_names = tuple(str(digit) for digit in range(10))

    def __init__(
        self,
        data_dir: str | os.PathLike[str] = "data",
        source: Source = "auto",
        digits: list[int] | int | None = None,
        focus: list[int] | int | None = None,
        focus_fraction: float = 0.35,
        augment: bool = False,
        eval_digits: list[int] | int | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 1000,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        download: bool = True,
    ) -> None:
        super().__init__(batch_size, eval_batch_size)
        if source not in ("auto", "full", "sample"):
            raise ValueError(f"source={source!r}: expected 'auto', 'full' or 'sample'.")
        digits, focus, eval_digits = as_list(digits), as_list(focus), as_list(eval_digits)
        for name, value in {"digits": digits, "focus": focus, "eval_digits": eval_digits}.items():
            _check_digits(name, value)
        if digits is not None and focus is not None:
            raise ValueError(
                f"digits={digits} and focus={focus} exclude each other: digits filters the training data, focus mixes "
                "it with all others. Give one of the two."
            )
        if focus is not None and len(focus) == 10:
            raise ValueError(f"focus={focus} leaves no other digit to mix in; name fewer digits.")
        check_share(focus_fraction)
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction!r}: expected a share of at least 0 and below 1.")
        self.data_dir = Path(data_dir)
        self.source: Source = source
        self.digits = digits
        self.focus = focus
        self.focus_fraction = focus_fraction
        self.augment = augment
        self.eval_digits = eval_digits
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.download = download
        self._why_sample = ""
        self._train: InMemoryDataset | None = None
        self._val: InMemoryDataset | None = None
        self._test: InMemoryDataset | None = None

    @override
    def prepare_data(self) -> None:
        self._why_sample = prepare(self.data_dir, self.source, self.download)

    @override
    def setup(self, stage: str) -> None:
        if self._test is not None:
            return
        files = read(self.data_dir, self.source)
        self.source = files.source
        held_out = round(self.val_fraction * len(files.train))
        kept, held = stratified_split(files.train.targets, held_out, self.split_seed)
        train = files.train.select(kept)
        self._train = _only(train, self.digits, "digits")
        self._val = _only(files.train.select(held), self.eval_digits, "eval_digits")
        self._test = _only(files.test, self.eval_digits, "eval_digits")
        rank_zero_info(
            f"MNIST: {self.description()}: {len(self._train):,} digits to train on"
            f"{f' (only {self.digits})' if self.digits else ''}, {len(self._val):,} to validate, "
            f"{len(self._test):,} to test{f' (only {self.eval_digits})' if self.eval_digits else ''}."
        )

    @override
    def make_train_loader(self) -> ResumableLoader:
        dataset = _ready(self._train)
        sampler: DistributedSampler[int] = ShuffledSampler(len(dataset), **self.placement())
        if self.focus is not None:
            sampler = replay_sampler(
                dataset.targets, self.focus, self.batch_size, self.focus_fraction, self.placement()
            )
        return ResumableLoader(dataset, sampler=sampler, batch_size=self.batch_size, **full_batches())

    @override
    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        dataset = _ready(self._val)
        if len(dataset):
            return self.eval_loader(dataset, **full_batches())
        if self.trainer is not None and self.trainer.state.fn == "validate":
            raise ValueError(f"val_fraction={self.val_fraction} holds nothing out to validate on; set it above 0.")
        return []

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self.eval_loader(_ready(self._test), **full_batches())

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        return self.eval_loader(_ready(self._test), **full_batches())

    @override
    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, targets = batch
        if images.dtype != torch.uint8:
            return batch
        # (x / 255 - mean) / std in one pass over new memory and one in place.
        images = images.unsqueeze(1).to(torch.float32)
        images = images.sub_(255 * MEAN).div_(255 * STD)
        if self.augment and self.trainer is not None and self.trainer.training:
            images = jitter(images)
        if self.trainer is not None:
            # Lightning converts a batch to bf16-true or 64-true before it comes here, and leaves uint8 alone.
            images = self.trainer.precision_plugin.convert_input(images)
        return images, targets

    @staticmethod
    def preprocessing_in_words() -> str:
        """Return how the model expects images."""
        return f"Grey values of 28 x 28 pixels from 0 to 1, less {MEAN}, divided by {STD}; float32 of shape (B, 1, 28, 28)."

    def description(self) -> str:
        """Return which digits these are and, if the sample stands in for the full database, why."""
        if self.source == "sample":
            return f"the embedded sample ({self._why_sample})" if self._why_sample else "the embedded sample"
        return f"the full database in {self.data_dir}"


def _check_digits(name: str, digits: list[int] | None) -> None:
    if digits is None:
        return
    if not digits:
        raise ValueError(
            f"{name}=[] selects nothing: name digits from 0 to 9, for example {name}=[9], or leave it out."
        )
    for digit in digits:
        if isinstance(digit, bool) or not isinstance(digit, int) or not 0 <= digit <= 9:
            raise ValueError(f"{name}={digits}: {digit!r} is not a digit; expected whole numbers from 0 to 9.")
    if len(set(digits)) < len(digits):
        raise ValueError(f"{name}={digits} repeats a digit; name each once.")


def _only(dataset: InMemoryDataset, digits: list[int] | None, name: str) -> InMemoryDataset:
    if digits is None:
        return dataset
    chosen = torch.isin(dataset.targets, torch.tensor(digits))
    if len(dataset) and not chosen.any():
        raise ValueError(f"{name}={digits}: the data has none of these digits.")
    return dataset.select(chosen)


def _ready(dataset: InMemoryDataset | None) -> InMemoryDataset:
    if dataset is None:
        raise RuntimeError(
            "MNISTDataModule is not set up: call prepare_data() and setup('fit') first, as Trainer does."
        )
    return dataset
