"""A loader that goes on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Sampler


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` whose place in the epoch is saved in checkpoints, by Lightning's interface for that.

    The order of samples has to be a function of the sampler's epoch. A resumed epoch goes on with the batch after the last one
    that was handed out; those before it are not loaded. It draws no random numbers but its own, so that
    validating or resuming does not change what training draws.

    Args:
        dataset: See `DataLoader`, as for all others.
        sampler: Its order is a function of its epoch and a seed.
        batch_size: Samples a batch.
        arguments: Passed on.

    Attributes:
        most: How many batches of an epoch are used at most: `RandomState` sets it to what `limit_train_batches` leaves of them.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: Sampler[int],
        batch_size: int,
        *,
        drop_last: bool = False,
        **arguments: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        super().__init__(dataset, batch_size, sampler=sampler, drop_last=drop_last, generator=generator, **arguments)
        self.batches = _Batches(sampler, batch_size, drop_last)
        # DataLoader has this set by its constructor alone; given there, it would hide the sampler from Lightning.
        object.__setattr__(self, "batch_sampler", self.batches)
        self.handed_out = 0
        self.most: float = float("inf")

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override] # all that is used of it is next()
        self.handed_out = self.batches.skip
        if hasattr(self.dataset, "set_epoch"):  # before workers take a copy of it
            self.dataset.set_epoch(getattr(self.batches.sampler, "epoch", 0))
        for batch in super().__iter__():
            self.handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, how many of its batches were handed out, and what makes them the batches that they are."""
        epoch = getattr(self.batches.sampler, "epoch", 0)
        if self.handed_out >= min(len(self), self.most):
            return {"epoch": epoch + 1, "handed_out": 0, "batches": self._description()}
        return {"epoch": epoch, "handed_out": self.handed_out, "batches": self._description()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` says, with the next iteration.

        Raises:
            ValueError: If it stands in the middle of an epoch of other batches.
        """
        if state["handed_out"] and state["batches"] != self._description():
            raise ValueError(
                f"The checkpoint was written after {state['handed_out']} batches of an epoch with {state['batches']}; this one has "
                f"{self._description()}. Resume with the same data, batch size and number of devices, or from the end of "
                "an epoch."
            )
        sampler = self.batches.sampler
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(state["epoch"])
        self.batches.skip = state["handed_out"]
        self.handed_out = state["handed_out"]

    def _description(self) -> dict[str, int]:
        sampler = self.batches.sampler
        devices = getattr(sampler, "num_replicas", 1)
        size, seed = len(self.dataset), getattr(sampler, "seed", 0)  # type: ignore[arg-type]
        return {"samples": size, "batch_size": self.batches.batch_size, "devices": devices, "seed": seed}


class _Batches(BatchSampler):
    """Batches of indices, of which the next iteration skips some."""

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.skip = 0

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= skip:
                yield batch
