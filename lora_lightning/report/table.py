"""Creates the table of classes for the terminal."""

from __future__ import annotations

import string
from math import isnan

from rich.table import Table
from rich.text import Text

from lora_lightning.report.confusion import Confusion, Report


def report_table(report: Report, title: str | None = None) -> Table:
    """Return a table with one row per class and a row for all: support, errors, recall and precision, before and after if there is a base.

    For more than 20 classes, the table contains the 20 with the lowest recall, and the caption says so. The last row contains the accuracy
    instead of the recall.
    """
    model, base = report.model, report.base
    names = model.class_names
    shown = model.shown()
    table = Table(
        title=title, title_justify="left", caption=_caption(model, len(shown)), caption_justify="left", show_footer=True
    )
    changes = [] if base is None else [b - a for a, b in zip(base.errors, model.errors, strict=True)]
    kind = "digit" if list(names) == list(string.digits) else "class"

    table.add_column(kind, "all", justify="right" if all(name.isdigit() for name in names) else "left")
    table.add_column("support", f"{model.total:,}", justify="right")
    if base is None:
        table.add_column("errors", f"{sum(model.errors):,}", justify="right")
    else:
        table.add_column("errors\nbefore", f"{sum(base.errors):,}", justify="right")
        table.add_column("errors\nafter", f"{sum(model.errors):,}", justify="right")
        table.add_column("change", _signed(sum(changes)), justify="right")
    table.add_column("recall %", _transition(base, model, "accuracy"), justify="right", no_wrap=True)
    table.add_column("precision %", "", justify="right", no_wrap=True)

    for index in shown:
        cells: list[str | Text] = [names[index], f"{model.support[index]:,}"]
        if base is not None:
            cells += [f"{base.errors[index]:,}", f"{model.errors[index]:,}", _signed(changes[index])]
        else:
            cells.append(f"{model.errors[index]:,}")
        cells += [_transition(base, model, "recall", index), _transition(base, model, "precision", index)]
        table.add_row(*cells)
    return table


def _caption(model: Confusion, shown: int) -> str | None:
    classes, with_samples = len(model.class_names), sum(support > 0 for support in model.support)
    if shown == classes:
        return None
    if shown == with_samples:
        return f"the other {classes - shown:,} classes have no samples"
    return f"the {shown} of {classes:,} classes with the lowest recall; confusion.csv contains all"


def _signed(change: int) -> Text:
    style = "green" if change < 0 else "red" if change > 0 else ""
    return Text(f"{change:+,}" if change else "0", style=style)


def _transition(base: Confusion | None, model: Confusion, ratio: str, index: int | None = None) -> str:
    values = [getattr(confusion, ratio) for confusion in (base, model) if confusion is not None]
    if index is not None:
        values = [value[index] for value in values]
    values = [100 * value for value in values]
    return " → ".join("–" if isnan(value) else f"{value:.1f}" for value in values)
