"""Defines what the numbers of one model have in common for all tasks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import isnan
from typing import Any, Protocol


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


def ratio(count: float, total: float) -> float:
    """Return the ratio, which is NaN for a total of zero."""
    return count / total if total else float("nan")


def or_none(value: float) -> float | None:
    """Return the number, or `None` if it is undefined."""
    return None if isnan(value) else value


def mean_of_known(values: Iterable[float]) -> float:
    """Return the mean of the numbers that are defined."""
    known = [value for value in values if not isnan(value)]
    return ratio(sum(known), len(known))


def loggable(name: str) -> str:
    """Return the name of a class with underscores for characters that some loggers refuse."""
    return re.sub(r"[^\w\-. ]", "_", name)
