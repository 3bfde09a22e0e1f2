"""Defines `MNISTDataModule`, for the full MNIST or a sample, with a filter or a focus on digits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from lora_lightning.checkpoints import ResumableLoader
from lora_lightning.data.augmentation import jitter
from lora_lightning.data.focus import as_list, check_share, replay_sampler
from lora_lightning.data.in_memory import InMemoryDataset, full_batches, stratified_split
from lora_lightning.data.mnist_files import Source, prepare, read
from lora_lightning.data.module import ResumableDataModule
from lora_lightning.data.samplers import ShuffledSampler
from lora_lightning.wording import for_log

MEAN, STD = 0.1307, 0.3081
"""Mean and standard deviation of the training pixels of MNIST, scaled to 0..1."""


class MNISTDataModule(ResumableDataModule):
    """Loads MNIST as batches of normalized images (B, 1, 28, 28), float32, and digits (B,), int64.

    The images are in memory as uint8. A batch is indexed in one operation, moved to the device and normalized there.

    Args:
        data_dir: Folder of torchvision's MNIST files (`<data_dir>/MNIST/raw`).
        source: `"full"` for all 70,000 digits, which torchvision downloads if necessary, `"sample"` for 5,000 of them
            that come with the package, or `"auto"` for the full set if it is on disk or can be downloaded, else the
            sample. After `setup`, the attribute `source` says which one is used.
        digits: Digits to train on. Validation and test use all ten.
        focus: Digits that have a fixed share of each training batch. The rest is drawn from all others (replay).
        focus_fraction: Share of these digits.
        augment: Whether to augment training images on the device with `lora_lightning.data.augmentation.jitter`.
        eval_digits: Digits to validate, test and predict on.
        batch_size: Batch size in training, per device.
        eval_batch_size: Batch size in validation, test and prediction, per device.
        val_fraction: Fraction of the training digits that is held out for validation, equal for every class. With 0,
            all of them are used for training and there is no validation.
        split_seed: Seed of the split. It is independent of the seed of the run, so that all runs hold out the same
            digits.
        download: Whether to download a missing database.

    Raises:
        ValueError: If a value is out of range.

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
                f"digits={digits} and focus={focus} cannot be combined: digits filters the training data, and focus "
                "mixes it with all others. Use one of the two."
            )
        if focus is not None and len(focus) == 10:
            raise ValueError(f"focus={focus} leaves no other digit to mix in; select fewer digits.")
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
        message = (
            f"MNIST: {self.description()}: {len(self._train):,} digits to train on"
            f"{f' (only {self.digits})' if self.digits else ''}, {len(self._val):,} to validate, "
            f"{len(self._test):,} to test{f' (only {self.eval_digits})' if self.eval_digits else ''}."
        )
        rank_zero_info(for_log(message))

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
            raise ValueError(f"val_fraction={self.val_fraction} leaves no digits for validation; set it above 0.")
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
        # (x / 255 - mean) / std in one pass to new memory and one in place.
        images = images.unsqueeze(1).to(torch.float32)
        images = images.sub_(255 * MEAN).div_(255 * STD)
        if self.augment and self.trainer is not None and self.trainer.training:
            images = jitter(images)
        if self.trainer is not None:
            # Lightning has converted the batch to bf16-true or 64-true before this hook, except for uint8.
            images = self.trainer.precision_plugin.convert_input(images)
        return images, targets

    @staticmethod
    def preprocessing_in_words() -> str:
        """Return a description of the preprocessing."""
        grey = f"Grey values of 28 x 28 pixels from 0 to 1, minus {MEAN}, divided by {STD}"
        return f"{grey}; float32 of shape (B, 1, 28, 28)."

    def description(self) -> str:
        """Return a description of the data and, if the sample replaces the full database, the reason."""
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
