"""Defines what the numbers of one model have in common for all tasks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from math import isfinite, isnan
from typing import Any, NamedTuple, Protocol

_LONGEST_LOGGED = 100


class Result(Protocol):
    """Holds the numbers of one model on one data set."""

    @property
    def total(self) -> int:
        """Return the number of samples, or of their parts."""

    def summary(self) -> dict[str, float]:
        """Return the numbers of all samples together, by name."""

    def table(self) -> dict[str, list[Any]]:
        """Return one column for each quantity. The first one contains names."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON. An undefined number is `None`."""


class Compared(NamedTuple):
    """Holds a number of the adapted model beside that of its base, or `None` for a model without a base."""

    adapted: float
    base: float | None = None

    @property
    def difference(self) -> float | None:
        """Return adapted minus base, or `None` without a base."""
        return None if self.base is None else self.adapted - self.base


def ratio(count: float, total: float) -> float:
    """Return the ratio, which is NaN for a total of zero."""
    return count / total if total else float("nan")


def or_none(value: float) -> float | None:
    """Return the number, or `None` if it is undefined or infinite, which JSON can not hold."""
    return value if isfinite(value) else None


def mean_of_known(values: Iterable[float]) -> float:
    """Return the mean of the numbers that are defined."""
    known = [value for value in values if not isnan(value)]
    return ratio(sum(known), len(known))


def loggable(name: str) -> str:
    """Return a name with underscores for characters that some loggers refuse, and of a length that all of them take."""
    return re.sub(r"[^\w\-. ]", "_", name[:_LONGEST_LOGGED])


def all_loggable(names: Sequence[str]) -> list[str]:
    """Return names that loggers take, and that still differ."""
    found = [loggable(name) for name in names]
    counts = Counter(found)
    return [f"{name}_{place}" if counts[name] > 1 else name for place, name in enumerate(found)]
