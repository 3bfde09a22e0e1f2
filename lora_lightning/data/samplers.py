"""Samplers whose order is a function of the seed and the epoch on any number of devices.

All are subclasses of `DistributedSampler`, so Lightning keeps them and calls `set_epoch`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

_WINDOW = 50
"""Number of batches whose samples are sorted by length together."""


class ShuffledSampler(DistributedSampler[int]):
    """Yields every sample once per epoch in random order.

    On several devices, the global batch of a step equals the batch of a single device with the corresponding larger
    batch size.

    Args:
        size: Number of samples.
        seed: With the epoch, it determines the order.
        num_replicas: Number of devices.
        rank: This device's number.
    """

    def __init__(self, size: int, *, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(range(size), num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self.dataset), generator=_generator(self.seed, self.epoch))  # type: ignore[arg-type]
        missing = self.total_size - len(order)
        if missing:
            # All devices take the same number of steps, so the last ones repeat the first samples of the order.
            order = torch.cat([order, order[:missing]])
        return iter(order[self.rank :: self.num_replicas].tolist())


class LengthGroupedSampler(DistributedSampler[int]):
    """Yields every sample once per epoch, in shuffled batches of similar length.

    The shuffled order is split into windows of 50 global batches, and each window is sorted by length. Then the batches
    are shuffled. This reduces padding, since the samples in a batch have similar lengths.

    Args:
        lengths: Length of each sample.
        batch_size: Samples in a batch on one device.
        seed: With the epoch, it determines the order.
        num_replicas: Number of devices.
        rank: This device's number.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, *, seed: int, num_replicas: int = 1, rank: int = 0
    ) -> None:
        super().__init__(range(len(lengths)), num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.lengths = torch.tensor(lengths)
        self.global_batch = batch_size * num_replicas

    def __iter__(self) -> Iterator[int]:
        generator = _generator(self.seed, self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        order = torch.cat([order, order[: self.total_size - len(order)]])
        parts = torch.split(order, _WINDOW * self.global_batch)
        windows = [rows[self.lengths[rows].argsort(stable=True)] for rows in parts]
        batches = torch.split(torch.cat(windows), self.global_batch)
        # An incomplete batch stays the last one. With several devices, each device takes its share of every batch.
        full = len(order) // self.global_batch
        places = [*torch.randperm(full, generator=generator).tolist(), *range(full, len(batches))]
        mixed = torch.cat([batches[place] for place in places])
        return iter(mixed[self.rank :: self.num_replicas].tolist())


class ReplaySampler(DistributedSampler[int]):
    """Yields batches with a fixed share of focus samples, where the rest is drawn from all others.

    The others are a replay against forgetting. An epoch passes once over the other samples and uses as many focus
    samples as necessary, which are shuffled again after all of them were used. Incomplete batches are dropped.

    Args:
        is_focus: Mask of the focus samples, a boolean tensor of shape (N,).
        batch_size: Samples in a batch on one device.
        focus_fraction: Share of focus samples in a batch, rounded to whole samples with at least one of each kind.
        seed: With the epoch, it determines the order.
        num_replicas: Number of devices.
        rank: This device's number.
        lengths: Length of each sample, for batches of similar length.

    Raises:
        ValueError: If one kind has no sample, or if a batch cannot contain both.
    """

    def __init__(
        self,
        is_focus: Tensor,
        *,
        batch_size: int,
        focus_fraction: float,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
        lengths: Sequence[int] | None = None,
    ) -> None:
        if not 0 < focus_fraction < 1:
            raise ValueError(f"focus_fraction={focus_fraction!r}: expected a share above 0 and below 1.")
        if batch_size < 2:
            raise ValueError(f"batch_size={batch_size}: a batch needs at least 2 samples, one in focus and one other.")
        self.focus_rows = is_focus.nonzero().flatten()
        self.other_rows = (~is_focus).nonzero().flatten()
        self.focus_per_batch = min(max(round(batch_size * focus_fraction), 1), batch_size - 1)
        self.others_per_batch = batch_size - self.focus_per_batch
        self.batch_size = batch_size
        self.lengths = None if lengths is None else torch.tensor(lengths)
        steps = len(self.other_rows) // (self.others_per_batch * num_replicas)
        if not len(self.focus_rows) or not steps:
            raise ValueError(
                f"{len(self.focus_rows)} focus and {len(self.other_rows)} other samples are not enough for one batch "
                f"of {self.focus_per_batch} + {self.others_per_batch} on each of {num_replicas} device(s)."
            )
        self.steps = steps
        rows = range(len(is_focus))
        super().__init__(rows, num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = _generator(self.seed, self.epoch)
        batches = self.steps * self.num_replicas
        others = self.other_rows[torch.randperm(len(self.other_rows), generator=generator)]
        others = others[: batches * self.others_per_batch].view(batches, -1)
        focus_count = batches * self.focus_per_batch
        rounds = -(-focus_count // len(self.focus_rows))
        passes = [torch.randperm(len(self.focus_rows), generator=generator) for _ in range(rounds)]
        focus = self.focus_rows[torch.cat(passes)[:focus_count]].view(batches, -1)
        if self.lengths is not None:
            focus, others = (_by_length(rows, self.lengths, _WINDOW * self.num_replicas) for rows in (focus, others))
        mixed = torch.cat([focus, others], dim=1)
        if self.lengths is not None:  # in a step, all devices have batches of similar length
            order = torch.randperm(self.steps, generator=generator)
            mixed = mixed.view(self.steps, self.num_replicas, -1)[order].flatten(0, 1)
        return iter(mixed[self.rank :: self.num_replicas].flatten().tolist())


class UnrepeatedSampler(DistributedSampler[int]):
    """Yields every sample once and in order on one of the devices.

    Counts are then exact with any number of samples and devices. Lightning's `UnrepeatedDistributedSampler` needs at
    least one sample per device.

    Args:
        size: Number of samples.
        num_replicas: Number of devices.
        rank: This device's number.
    """

    def __init__(self, size: int, *, num_replicas: int, rank: int) -> None:
        super().__init__(range(size), num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.rows = range(rank, size, num_replicas)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)


def _by_length(batches: Tensor, lengths: Tensor, window: int) -> Tensor:
    """Sort the samples of each window of `window` batches by length. The result has the shape (batches, samples)."""
    parts = [part.flatten() for part in torch.split(batches, window)]
    return torch.cat([part[lengths[part].argsort(stable=True)] for part in parts]).view_as(batches)


def _generator(seed: int, epoch: int) -> torch.Generator:
    # With seed + epoch, consecutive seeds would have the same orders in different epochs.
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)
