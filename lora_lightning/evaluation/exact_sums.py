"""Sums the columns of batches so that the result does not depend on how the rows are distributed over batches."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor


class ExactSums:
    """Sums columns with twice the precision of float64, as the sum of two float64 numbers.

    Args:
        columns: Number of columns.
    """

    def __init__(self, columns: int) -> None:
        self._high, self._low = (torch.zeros(columns, dtype=torch.float64) for _ in range(2))

    def add(self, rows: Tensor, rest: Tensor | None = None) -> None:
        """Add rows of shape (N, columns), float64.

        Args:
            rows: The rows.
            rest: What the rows lack as float64 numbers, of the same shape, or `None` for nothing.
        """
        high, low = rows, torch.zeros_like(rows) if rest is None else rest
        while len(high) > 1:  # pairs of rows, so that few operations are needed
            if len(high) % 2:
                high, low = (torch.cat((each, torch.zeros_like(each[:1]))) for each in (high, low))
            high, low = _sum(high[::2], low[::2], high[1::2], low[1::2])
        if len(high):
            self._high, self._low = _sum(self._high, self._low, high[0].cpu(), low[0].cpu())

    def merge(self, other: Self) -> None:
        """Add the sums of another device."""
        self._high, self._low = _sum(self._high, self._low, other._high, other._low)

    def sums(self) -> Tensor:
        """Return the sums, of shape (columns,)."""
        return self._high + self._low

    def parts(self) -> tuple[Tensor, Tensor]:
        """Return the sums as float64 numbers, and what these lack."""
        return self._high, self._low


def squared_deviations(sums: ExactSums, columns: slice, squares: slice, counts: Tensor) -> Tensor:
    """Return Σ (x - m)² = Σ x² - 2 m Σ x + n m² for columns of x and columns of x², where m is the mean.

    Args:
        sums: The sums.
        columns: The columns of x.
        squares: The columns of x².
        counts: Number of values n of each column.
    """
    mean = sums.sums()[columns] / counts
    found = ExactSums(len(mean))
    factors = ((torch.ones_like(mean), squares), (-2 * mean, columns))
    terms = [product(factor, part[chosen]) for factor, chosen in factors for part in sums.parts()]
    terms += [product(counts, part) for part in product(mean, mean)]
    for each in terms:
        found.add(torch.stack(each))
    return without_rounding(found.sums(), mean, counts)


def without_rounding(deviations: Tensor, mean: Tensor, counts: Tensor) -> Tensor:
    """Return squared deviations, of which those are zero that come from the rounding of the mean of equal values."""
    return deviations.where(~(deviations <= counts * (mean * 2**-51) ** 2), 0)


def product(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the product of float64 numbers and its rounding error (Dekker 1971)."""
    found = first * second
    a, b = _halves(first), _halves(second)
    rest = ((a[0] * b[0] - found) + a[0] * b[1] + a[1] * b[0]) + a[1] * b[1]
    return found, rest.where(rest.isfinite(), 0)


def _halves(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return two numbers of half the precision whose sum is the value."""
    scaled = value * 134217729.0  # 2^27 + 1
    high = scaled - (scaled - value)
    return high, value - high


def _sum(high: Tensor, low: Tensor, other_high: Tensor, other_low: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of two pairs of numbers as such a pair (Knuth 1969, Dekker 1971)."""
    total = high + other_high
    part = total - high
    rest = (high - (total - part)) + (other_high - part) + low + other_low
    found = total + rest
    low = rest - (found - total)
    return found.where(found.isfinite(), total), low.where(low.isfinite(), 0)
