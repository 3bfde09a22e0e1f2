"""Creates the table of classes for the terminal."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import Literal

from rich import get_console
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from lora_lightning.evaluation import SHOWN_CLASSES, Compared, Confusion, Report
from lora_lightning.wording import one_line

_LONGEST_NAME, _SHORT_NAME, _WIDE = 60, 12, 100
"""Characters of the longest name, of one that leaves room for all columns, and of a terminal that is wide enough."""
_UNCHANGED = ("label", "targets", "support", "samples")
_LEFT_OUT = ("true_positives", "false_positives", "false_negatives", "true_negatives")
"""Columns of files that the terminal has no room for."""
_LESS_IMPORTANT = ("precision %", "support", "change", "recall %")
"""Columns that a narrow terminal has no room for, in the order in which they are left out."""
_BORDER = 3
"""Characters between two columns."""


@dataclass(frozen=True)
class _Column:
    """Holds a column of a table: its header, what stands in the last row, and the cells."""

    header: str
    footer: Text
    cells: list[Text]

    @property
    def width(self) -> int:
        texts = [*self.header.splitlines(), self.footer.plain, *(cell.plain for cell in self.cells)]
        return max(map(cell_len, texts)) + _BORDER


def report_table(report: Report, title: str | None = None) -> Table:
    """Return a table of a report for the terminal.

    For classes, it has one row per class and a row for all: support, errors, recall and precision, before and after if
    there is a base. For more than 20 classes, it contains the 20 with the lowest recall, and the caption says so. The
    last row contains the accuracy instead of the recall. A narrow terminal gets fewer columns, and no number is cut.
    For other tasks, it has one row per label or fifth of the targets. Metrics of the user stand below, with the
    difference.
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
    rows = range(len(adapted[names[0]]))[:SHOWN_CLASSES]
    columns = []
    for name in names:
        cells = []
        for row in rows:
            before = base.get(name, adapted[name])[row]
            after = adapted[name][row]
            if name in _UNCHANGED or report.base is None:
                cells.append(Text(_shown(after)))
            else:
                cells.append(Text(f"{_shown(before)} → {_shown(after)}"))
        columns.append(_Column(name.replace("_", " "), Text(), cells))
    first, *numbers = columns
    _add(table, first, _that_fit(first, numbers, [column.header for column in numbers[:0:-1]]), "left")
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

    first = _Column(kind, Text("all"), [Text(one_line(names[index], _LONGEST_NAME)) for index in shown])
    numbers = [_counts("support", model.total, [model.support[index] for index in shown])]
    if base is None:
        numbers.append(_counts("errors", sum(model.errors), [model.errors[index] for index in shown]))
    else:
        numbers.append(_counts("errors\nbefore", sum(base.errors), [base.errors[index] for index in shown]))
        numbers.append(_counts("errors\nafter", sum(model.errors), [model.errors[index] for index in shown]))
        numbers.append(_Column("change", _signed(sum(changes)), [_signed(changes[index]) for index in shown]))
    recall = [_transition(base, model, "recall", index) for index in shown]
    numbers.append(_Column("recall %", _transition(base, model, "accuracy"), recall))
    longest = max((len(names[index]) for index in shown), default=0)
    if longest <= _SHORT_NAME or get_console().width >= _WIDE:
        precision = [_transition(base, model, "precision", index) for index in shown]
        numbers.append(_Column("precision %", Text(), precision))
    justify: Literal["left", "right"] = "right" if all(name.isdigit() for name in names) else "left"
    _add(table, first, _that_fit(first, numbers, _LESS_IMPORTANT), justify)
    return table


def _that_fit(first: _Column, numbers: list[_Column], less_important: Sequence[str]) -> list[_Column]:
    """Leave out columns of numbers, in this order, until the others are complete in the width of the terminal."""
    room = get_console().width - 1 - min(first.width, _SHORT_NAME + _BORDER)
    found = list(numbers)
    for header in less_important:
        if sum(column.width for column in found) > room:
            found = [column for column in found if column.header != header]
    return found


def _add(table: Table, first: _Column, numbers: list[_Column], justify: Literal["left", "right"]) -> None:
    table.add_column(first.header, first.footer, justify=justify)
    for column in numbers:
        table.add_column(column.header, column.footer, justify="right", no_wrap=True)
    for row in zip(first.cells, *(column.cells for column in numbers), strict=True):
        table.add_row(*row)


def _counts(header: str, total: int, counts: list[int]) -> _Column:
    return _Column(header, Text(f"{total:,}"), [Text(f"{count:,}") for count in counts])


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


def _transition(base: Confusion | None, model: Confusion, ratio: str, index: int | None = None) -> Text:
    values = [getattr(confusion, ratio) for confusion in (base, model) if confusion is not None]
    if index is not None:
        values = [value[index] for value in values]
    values = [100 * value for value in values]
    return Text(" → ".join("–" if isnan(value) else f"{value:.1f}" for value in values))
