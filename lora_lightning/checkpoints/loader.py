"""Defines a data loader that resumes in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Sampler, SequentialSampler


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` that saves its position in the epoch in checkpoints, through Lightning's interface.

    The order of the samples must be a function of the epoch of the sampler. A resumed epoch continues with the batch
    after the last one that was returned, and does not load the earlier ones. The loader has its own random number
    generator, so validation and resuming do not affect the random numbers in training.

    Args:
        dataset: The data set.
        sampler: A sampler whose order is a function of its epoch and a seed. By default, samples are in the order of
            the data set.
        batch_size: Number of samples in a batch.
        batch_sampler: The batch sampler of another `ResumableLoader`. Lightning makes such a copy for
            `overfit_batches`.
        arguments: Further arguments of `DataLoader`.

    Attributes:
        most: Maximum number of batches in an epoch. `RandomState` sets it according to `limit_train_batches`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        sampler: Sampler[int] | None = None,
        batch_size: int = 1,
        drop_last: bool = False,
        batch_sampler: _Batches | None = None,
        **arguments: Any,
    ) -> None:
        # Not `sampler or ...`, since an empty sampler is false.
        if sampler is None:
            sampler = SequentialSampler(dataset)  # type: ignore[arg-type]
        batches = _Batches(sampler, batch_size, drop_last) if batch_sampler is None else batch_sampler
        # When Lightning copies the loader, these may be among the arguments.
        arguments |= {"sampler": batches.sampler, "drop_last": batches.drop_last, "generator": torch.Generator()}
        arguments["generator"].manual_seed(0)
        super().__init__(dataset, batches.batch_size, **arguments)
        self.batches = batches
        # Only the constructor of DataLoader accepts a batch_sampler, but would then hide the sampler from Lightning.
        object.__setattr__(self, "batch_sampler", self.batches)
        self.handed_out = 0
        self.most: float = float("inf")

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override] # only next() is used
        self.handed_out = self.batches.skip
        if hasattr(self.dataset, "set_epoch"):  # before workers copy it
            self.dataset.set_epoch(getattr(self.batches.sampler, "epoch", 0))
        for batch in super().__iter__():
            self.handed_out += 1
            yield batch

    def begin_epoch(self) -> None:
        """Continue with the first batch of an epoch."""
        self.batches.skip = self.handed_out = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of batches that were returned, and the settings that determine the batches."""
        epoch = getattr(self.batches.sampler, "epoch", 0)
        if self.handed_out >= min(len(self), self.most):
            return {"epoch": epoch + 1, "handed_out": 0, "batches": self._description()}
        return {"epoch": epoch, "handed_out": self.handed_out, "batches": self._description()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position in `state` in the next iteration.

        If the batches differ, continue after the same number of samples, and warn.
        """
        skip, before, now = state["handed_out"], state["batches"], self._description()
        if skip and before != now:
            samples = skip * before["batch_size"] * before["devices"]
            skip = min(samples // (now["batch_size"] * now["devices"]), len(self) - 1)
            rank_zero_warn(
                f"The checkpoint was written after {state['handed_out']} batches of an epoch with {before}; this run "
                f"has {now}. It continues after {skip} of its batches, so some samples may be used twice in this "
                "epoch, or not at all. For bitwise equal results, resume with the same data, batch size and number of "
                "devices, or from the end of an epoch."
            )
        sampler = self.batches.sampler
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(state["epoch"])
        self.batches.skip = self.handed_out = skip

    def _description(self) -> dict[str, int]:
        sampler = self.batches.sampler
        devices = getattr(sampler, "num_replicas", 1)
        size, seed = len(self.dataset), getattr(sampler, "seed", 0)  # type: ignore[arg-type]
        return {"samples": size, "batch_size": self.batches.batch_size, "devices": devices, "seed": seed}


class _Batches(BatchSampler):
    """Yields batches of indices, of which the next iteration skips some."""

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.skip = 0

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= skip:
                yield batch
