"""Keeps the errors of the validations of a `fit`."""

from __future__ import annotations

from typing import Any

from lora_lightning.evaluation import Confusion, Labels, Report, Values, or_none


class Validations:
    """Keeps the errors, or the mean absolute error, of each validation of a `fit`, and those of the base in the first.

    Attributes:
        last: The report of the last validation, or `None` before.
    """

    def __init__(self) -> None:
        self.last: Report | None = None
        self._facts: dict[str, Any] = {}
        self._each: list[float | None] = []

    def add(self, report: Report, has_base: bool) -> None:
        """Add a validation. `has_base` says whether its base was counted completely."""
        if self.last is None:
            self._facts = {
                "name": "mean absolute error" if isinstance(report.adapted, Values) else "errors",
                "samples": report.adapted.total,
                "base": _main_number(report.base) if has_base and report.base is not None else None,
            }
            if isinstance(report.adapted, Confusion):
                self._facts["guess"] = report.adapted.total - max(report.adapted.support, default=0)
        self.last = report
        self._each.append(_main_number(report.adapted))

    def facts(self) -> dict[str, Any]:
        """Return plain numbers for `run.json`. `guess` are the errors of always predicting the most frequent class."""
        return {"validations": self._facts | {"each": self._each}} if self._each else {}


def _main_number(result: object) -> float | None:
    """Return the number of errors of all classes or labels, or the mean absolute error of values."""
    if isinstance(result, Confusion | Labels):
        return sum(result.errors)
    return or_none(result.mae) if isinstance(result, Values) else None
