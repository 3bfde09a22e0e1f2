"""Says in a sentence whether adapters helped, for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_lightning.evaluation import Confusion, Report
from lora_lightning.report.class_view import ClassView
from lora_lightning.report.files import content_of
from lora_lightning.report.number_view import NumberView
from lora_lightning.report.view import Verdict


def verdict_of(report: Report, facts: Mapping[str, Any]) -> Verdict:
    """Return the verdict that `report.html` has for this report.

    Args:
        report: The report of one pass over data.
        facts: The content of `run.json`, as far as it is known.
    """
    content = content_of(report)
    if not isinstance(report.adapted, Confusion):
        return NumberView(content, facts).verdict()
    models = [report.adapted] if report.base is None else [report.base, report.adapted]
    return ClassView(content, [model.matrix for model in models], facts).verdict()
