"""Creates the table of classes for the terminal."""

from __future__ import annotations

import string
from math import isnan

from rich import get_console
from rich.table import Table
from rich.text import Text

from lora_lightning.evaluation import SHOWN_CLASSES, Compared, Confusion, Report
from lora_lightning.wording import one_line

_LONGEST_NAME, _SHORT_NAME, _WIDE = 60, 12, 100
"""Characters of the longest name, of one that leaves room for all columns, and of a terminal that is wide enough."""
_UNCHANGED = ("label", "targets", "support", "samples")
_LEFT_OUT = ("true_positives", "false_positives", "false_negatives", "true_negatives")
"""Columns of files that the terminal has no room for."""


def report_table(report: Report, title: str | None = None) -> Table:
    """Return a table of a report for the terminal.

    For classes, it has one row per class and a row for all: support, errors, recall and precision, before and after if
    there is a base. For more than 20 classes, it contains the 20 with the lowest recall, and the caption says so. The
    last row contains the accuracy instead of the recall. For other tasks, it has one row per label or fifth of the
    targets. Metrics of the user stand below, with the difference.
    """
    if isinstance(report.adapted, Confusion):
        table = _table_of_classes(report, title)
    else:
        table = _table_of_columns(report, title)
    below = [] if table.caption is None else [str(table.caption)]
    numbers = report.metrics if isinstance(report.adapted, Confusion) else report.summary()
    below += [f"{one_line(name, _LONGEST_NAME)}: {_compared(each)}" for name, each in numbers.items()]
    if report.p_value is not None and not isinstance(report.adapted, Confusion):
        below.append(f"p = {report.p_value:.2g} for a difference of zero")
    table.caption = Text("\n".join(below)) if below else None
    return table


def _table_of_columns(report: Report, title: str | None) -> Table:
    """Return one row per label or part of the data, with a column for each quantity."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    adapted = report.adapted.table()
    base = {} if report.base is None else report.base.table()
    names = [name for name in adapted if name not in _LEFT_OUT]
    for number, name in enumerate(names):
        table.add_column(name.replace("_", " "), justify="left" if number == 0 else "right")
    for row in range(len(adapted[names[0]]))[:SHOWN_CLASSES]:
        cells = []
        for name in names:
            before = base.get(name, adapted[name])[row]
            after = adapted[name][row]
            if name in _UNCHANGED or report.base is None:
                cells.append(Text(_shown(after)))
            else:
                cells.append(Text(f"{_shown(before)} → {_shown(after)}"))
        table.add_row(*cells)
    if len(adapted[names[0]]) > SHOWN_CLASSES:
        table.caption = f"the first {SHOWN_CLASSES} of {len(adapted[names[0]]):,} rows; comparison.csv contains all"
    return table


def _shown(value: object) -> str:
    if isinstance(value, float):
        return "–" if isnan(value) else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else one_line(str(value), _LONGEST_NAME)


def _compared(numbers: Compared) -> str:
    """Return a number before and after, and the difference: `0.5 → 0.625 (+0.125)`."""
    if numbers.base is None or numbers.difference is None:
        return _shown(numbers.adapted)
    difference = "–" if isnan(numbers.difference) else f"{numbers.difference:+.3g}"
    return f"{_shown(numbers.base)} → {_shown(numbers.adapted)} ({difference})"


def _table_of_classes(report: Report[Confusion], title: str | None) -> Table:
    model, base = report.adapted, report.base
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
    longest = max((len(names[index]) for index in shown), default=0)
    has_room = longest <= _SHORT_NAME or get_console().width >= _WIDE
    if has_room:
        table.add_column("precision %", "", justify="right", no_wrap=True)

    for index in shown:
        cells: list[str | Text] = [Text(one_line(names[index], _LONGEST_NAME)), f"{model.support[index]:,}"]
        if base is not None:
            cells += [f"{base.errors[index]:,}", f"{model.errors[index]:,}", _signed(changes[index])]
        else:
            cells.append(f"{model.errors[index]:,}")
        cells.append(_transition(base, model, "recall", index))
        if has_room:
            cells.append(_transition(base, model, "precision", index))
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
