"""Places the marks of the charts of a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, isnan, log10

from lora_lightning.report.history import History
from lora_lightning.report.view import SHOWN_ROWS, Change, Dot, Kind, Move, Moves, Scatter, kind_of, signed, significant

_POINTS = 200
"""Maximum number of points of a curve."""
_IN_WORDS = {"lr": "learning rate", "delta_norm": "norm of ΔW"}
"""Titles of the measures that this package logs."""


def ticks(top: float, most: int = 5) -> tuple[float, list[float]]:
    """Return the end of a scale from zero to at least `top`, and up to `most` round numbers on it."""
    if not top > 0:
        return 1.0, [0.0, 1.0]
    step = 10.0 ** floor(log10(top))
    step = next(
        each for each in (step / 4, step / 2, step, 2 * step, 2.5 * step, 5 * step) if top / each <= most - 0.999
    )
    count = -int(-top / step // 1)
    return count * step, [number * step for number in range(count + 1)]


@dataclass(frozen=True)
class Row:
    """Holds the numbers of a row of the chart of changes: of a class, a label or a part of the data."""

    name: str
    before: float | None
    after: float
    change: Change
    is_focus: bool = False


def moves(title: str, note: str, rows: Sequence[Row], lower_is_better: bool, is_count: bool = True) -> Moves | None:
    """Return the chart of changes, most improved first. It has the rows that changed most, if there are many.

    Args:
        title: The heading.
        note: What is drawn.
        rows: The numbers.
        lower_is_better: Whether a smaller number is better.
        is_count: Whether the numbers are counts.
    """
    known = [row for row in rows if not isnan(row.after) and (row.before is None or not isnan(row.before))]
    if not known:
        return None
    sign = 1 if lower_is_better else -1
    if len(known) > SHOWN_ROWS:
        kept = _most_changed(known, sign)
        note += f" Of {len(known):,} rows, the {SHOWN_ROWS} that changed most in either direction."
    else:
        kept = known
    ordered = sorted(kept, key=lambda row: (sign * _step(row), -sign * row.after))
    end, marks = ticks(max(max(row.after, row.before or 0) for row in kept))
    shown = [
        Move(
            row.name,
            row.change,
            "" if row.before is None else signed(row.after - row.before, is_count),
            None if row.before is None else 100 * row.before / end,
            100 * row.after / end,
            row.is_focus,
        )
        for row in ordered
    ]
    return Moves(title, note, shown, [(_tick(mark), 100 * mark / end) for mark in marks], is_count)


def scatter(points: Sequence[Sequence[float]], count: int) -> Scatter | None:
    """Return a scatter plot of the errors of samples.

    Args:
        points: The error of the base and of the adapted model on each sample.
        count: Number of all samples.
    """
    if not points:
        return None
    end, marks = ticks(max(max(each) for each in points))
    dots = [Dot(before / end, after / end, kind_of(before, after, True)) for before, after in points]
    better = sum(dot.kind == "better" for dot in dots)
    which = "Each sample" if len(points) == count else f"{len(points):,} of {count:,} samples"
    note = (
        f"{which}: the absolute error of the adapted model (upwards) against that of the base (to the right). "
        f"{better:,} lie below the line, where the adapted model is better, and "
        f"{sum(dot.kind == 'worse' for dot in dots):,} above it."
    )
    return Scatter(note, dots, [(_tick(mark), mark / end) for mark in marks])


@dataclass(frozen=True)
class Line:
    """Holds a curve: its name, the points of an SVG polyline, and what a screen reader says."""

    name: str
    points: str
    words: str
    kind: Kind
    last: tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """Holds the curves of one measure. The drawing is 100 units wide and high, with the origin at the top left."""

    title: str
    lines: list[Line]
    low: str
    high: str
    first: str
    last: str

    @property
    def words(self) -> str:
        """Return a description for a screen reader."""
        return f"Curves of the training, {self.title}: " + "; ".join(line.words for line in self.lines)


def panels(history: History) -> list[Panel]:
    """Return a panel for each measure with at least two values. Validation is drawn in blue, training in grey."""
    found = []
    for measure, lines in history.curves().items():
        values = [value for points in lines.values() for _, value in points]
        steps = [step for points in lines.values() for step, _ in points]
        low, high, first, last = min(values), max(values), min(steps), max(steps)
        drawn = []
        for name, points in lines.items():
            every = -(-len(points) // _POINTS)
            kept = [*points[::every], *([points[-1]] if (len(points) - 1) % every else [])]
            places = [
                (100 * (step - first) / max(last - first, 1), 100 - 100 * (value - low) / ((high - low) or 1))
                for step, value in kept
            ]
            words = f"{name} from {significant(points[0][1])} to {significant(points[-1][1])}"
            kind: Kind = "better" if name.startswith("val") else "same"
            text = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            drawn.append(Line(name, text, words, kind, places[-1]))
        top = significant(high) if high > low else ""
        found.append(Panel(_IN_WORDS.get(measure, measure), drawn, significant(low), top, f"{first:,}", f"{last:,}"))
    return found


def signal_points(values: Sequence[float]) -> str:
    """Return the points of an SVG polyline for a signal, in a drawing of 100 by 60 units."""
    low, high = min(values), max(values)
    scale = (high - low) or 1
    last = max(len(values) - 1, 1)
    return " ".join(f"{100 * x / last:.1f},{57 - 54 * (y - low) / scale:.1f}" for x, y in enumerate(values))


def _most_changed(rows: Sequence[Row], sign: int) -> list[Row]:
    """Return those in focus, those that changed most for the worse, at most half, and those that changed most."""
    by_size = sorted(rows, key=lambda row: (not row.is_focus, -abs(_step(row)), -row.after * sign))
    focus = [row for row in by_size if row.is_focus]
    worse = [row for row in by_size if sign * _step(row) > 0 and not row.is_focus][: SHOWN_ROWS // 2]
    rest = [row for row in by_size if row not in focus and row not in worse]
    return [*focus, *worse, *rest][:SHOWN_ROWS]


def _tick(mark: float) -> str:
    return f"{mark:,.10g}"


def _step(row: Row) -> float:
    return 0.0 if row.before is None else row.after - row.before
