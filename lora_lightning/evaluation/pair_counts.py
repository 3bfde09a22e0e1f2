"""Counts pairs of a target class and a predicted class, of any number of classes."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

MOST_DENSE = 2048
"""The largest number of classes whose counts are a dense matrix. Of more classes, only pairs that occur are kept."""
_SENT_DENSE = 256
_MOST_WAITING, _MOST_WAITING_DENSE = 1_000_000, 50_000


class PairCounts:
    """Counts pairs of a target and a prediction on one device.

    Args:
        classes: Number of classes C.
        device: Device of the targets and predictions.
    """

    def __init__(self, classes: int, device: torch.device | str) -> None:
        self.classes = classes
        self._dense: Tensor | None = None
        self._keys = torch.zeros(0, dtype=torch.int64, device=device)
        """Sorted pairs as target * C + prediction, with their counts. Those that wait are not yet among them."""
        self._counts = torch.zeros_like(self._keys)
        self._waiting: list[Tensor] = []
        self._number_waiting = 0
        if classes <= MOST_DENSE:
            self._dense = torch.zeros(classes**2, dtype=torch.int64, device=device)

    @property
    def total(self) -> int:
        """Return the number of counted pairs."""
        return int(self._counts.sum() if self._dense is None else self._dense.sum()) + self._number_waiting

    def add(self, targets: Tensor, predicted: Tensor) -> None:
        """Count pairs, given as classes of shape (N,)."""
        self._waiting.append(torch.add(predicted, targets, alpha=self.classes))
        self._number_waiting += len(targets)
        if self._number_waiting > (_MOST_WAITING if self._dense is None else _MOST_WAITING_DENSE):
            self._sum_up()

    def merge(self, other: Self) -> None:
        """Add the counts of another device."""
        self._sum_up()
        other._sum_up()
        if self._dense is not None and other._dense is not None:
            self._dense += other._dense
            return
        keys = torch.cat((self._keys, other._keys))
        self._keep(keys, torch.cat((self._counts, other._counts)))

    def matrix(self) -> Tensor:
        """Return the counts of shape (C, C) on the CPU, as a sparse tensor for more than 2,048 classes."""
        size = (self.classes, self.classes)
        self._sum_up()
        if self._dense is not None:
            return self._dense.view(size).cpu()
        places = torch.stack((self._keys // self.classes, self._keys % self.classes)).cpu()
        counts = self._counts.cpu()
        return torch.sparse_coo_tensor(places, counts, size, is_coalesced=True, check_invariants=True)

    def to_cpu(self) -> None:
        """Move the counts to the CPU."""
        self._sum_up()
        if self._dense is not None:
            self._dense = self._dense.cpu()
        self._keys, self._counts = self._keys.cpu(), self._counts.cpu()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another device, with the counts of many classes as those that are not zero."""
        self._sum_up()
        dense = self._dense if self._dense is None or self.classes <= _SENT_DENSE else self._dense.to_sparse()
        return vars(self) | {"_dense": dense}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        dense = state["_dense"]
        vars(self).update(state | {"_dense": dense.to_dense() if dense is not None and dense.is_sparse else dense})

    def _sum_up(self) -> None:
        """Count the pairs that wait."""
        if not self._waiting:
            return
        waiting = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
        self._waiting, self._number_waiting = [], 0
        if self._dense is not None:  # not in place, since it may have been made in inference mode
            self._dense = self._dense.index_add(0, waiting, waiting.new_ones(()).expand_as(waiting))
        else:
            self._keep(torch.cat((self._keys, waiting)), torch.cat((self._counts, torch.ones_like(waiting))))

    def _keep(self, keys: Tensor, counts: Tensor) -> None:
        self._keys, places = torch.unique(keys, return_inverse=True)
        self._counts = torch.zeros_like(self._keys).index_add_(0, places, counts)
