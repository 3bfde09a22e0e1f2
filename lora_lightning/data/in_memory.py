"""Defines a data set in memory that returns full batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

Batch = TypeVar("Batch")


class InMemoryDataset(Dataset[tuple[Tensor, Tensor]]):
    """Holds inputs and targets as two tensors and returns a batch with one indexing operation.

    Args:
        inputs: Inputs of shape (N, ...) in a compact form (uint8 pixels).
        targets: Class indices of shape (N,), int64.
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} inputs for {len(targets)} targets; expected the same number of both.")
        self.inputs = inputs
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a full batch. `DataLoader` calls this once instead of `__getitem__` for each sample."""
        rows = torch.tensor(indices, dtype=torch.long)
        return self.inputs[rows], self.targets[rows]

    def select(self, rows: Tensor) -> InMemoryDataset:
        """Return a data set with these rows."""
        return InMemoryDataset(self.inputs[rows], self.targets[rows])


def full_batches() -> dict[str, Any]:
    """Return arguments of a data loader for data sets that return full batches."""
    return {"collate_fn": _unchanged, "pin_memory": torch.cuda.is_available()}


def _unchanged(batch: Batch) -> Batch:
    return batch


def stratified_split(targets: Tensor, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split rows at random such that every class keeps its share, up to rounding.

    Args:
        targets: Class indices of shape (N,).
        held_out: Number of rows to hold out, between 0 and N.
        seed: Seed. The split is a function of it and of `targets`.

    Returns:
        `(kept, held_out)`: row indices, each in ascending order.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(targets), generator=generator)
    by_class = [shuffled[targets[shuffled] == label] for label in torch.unique(targets)]
    # Row k of a class with n rows has the position (k + 1/2) / n, so the lowest positions contain the same share of
    # each class.
    position = torch.cat([(torch.arange(len(rows), dtype=torch.float64) + 0.5) / len(rows) for rows in by_class])
    chosen = torch.cat(by_class)[position.argsort(stable=True)[:held_out]]
    mask = torch.zeros(len(targets), dtype=torch.bool)
    mask[chosen] = True
    return (~mask).nonzero().flatten(), mask.nonzero().flatten()
