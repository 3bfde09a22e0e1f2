"""Defines `ResumableDataModule`, the common base of the data modules."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler
from typing_extensions import override

from lora_lightning.checkpoints import ResumableLoader
from lora_lightning.data.samplers import UnrepeatedSampler


class ResumableDataModule(LightningDataModule):
    """Provides a resumable order of training samples, and evaluates every sample once on any number of devices.

    Args:
        batch_size: Batch size in training, per device.
        eval_batch_size: Batch size in validation, test and prediction, per device.

    Raises:
        ValueError: If a batch size is below 1.
    """

    def __init__(self, batch_size: int, eval_batch_size: int) -> None:
        super().__init__()
        for name, size in {"batch_size": batch_size, "eval_batch_size": eval_batch_size}.items():
            if size < 1:
                raise ValueError(f"{name}={size!r}: expected at least 1.")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        # With fewer test samples than devices, some devices have no samples.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._train_loader: ResumableLoader | None = None
        self._resume_from: dict[str, Any] = {}

    @abstractmethod
    def make_train_loader(self) -> ResumableLoader:
        """Return a loader for the training batches of an epoch, from its start."""

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        self._train_loader = self.make_train_loader()
        if self._resume_from:
            self._train_loader.load_state_dict(self._resume_from)
            self._resume_from = {}
        return self._train_loader

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the position in the epoch, for checkpoints."""
        return {} if self._train_loader is None else self._train_loader.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning does not call the interface of the loader for this if a scheduler has counted the steps of the run
        # before.
        self._resume_from = state_dict

    def placement(self) -> dict[str, int]:
        """Return arguments of a sampler: the seed of the run, the number of devices, and the rank of this device."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        if self.trainer is None:
            return {"seed": seed, "num_replicas": 1, "rank": 0}
        return {"seed": seed, "num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}

    def eval_loader(self, dataset: Dataset[Any], **arguments: Any) -> DataLoader[Any]:
        """Return a loader of every sample once and in order, which does not affect the random state of the run."""
        size, batch_size = len(dataset), self.eval_batch_size  # type: ignore[arg-type]
        placement = self.placement()
        sampler: Sampler[int] = SequentialSampler(dataset)  # type: ignore[arg-type]
        if placement["num_replicas"] > 1:
            # The default of Lightning repeats samples, so that all devices have the same number, and counts would not
            # be exact.
            sampler = UnrepeatedSampler(size, num_replicas=placement["num_replicas"], rank=placement["rank"])
        loader = DataLoader(dataset, batch_size=batch_size, sampler=sampler, generator=torch.Generator(), **arguments)
        if isinstance(sampler, UnrepeatedSampler) and not len(sampler):
            # Lightning would skip a device without batches while the others wait for it, so it gets an empty batch.
            # Only the constructor of DataLoader accepts a batch_sampler, but would then hide the sampler.
            object.__setattr__(loader, "batch_sampler", _EmptyBatch(sampler, batch_size, drop_last=False))
        return loader


class _EmptyBatch(BatchSampler):
    """Yields one batch without samples. Lightning can recreate the class, as it does for prediction."""

    def __iter__(self) -> Iterator[list[int]]:
        yield []

    def __len__(self) -> int:
        return 1
