"""Defines the parts of a report page, which are the same for all tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isnan
from typing import Any, Literal

from lora_lightning.evaluation import ChangedSample

Kind = Literal["better", "worse", "same"]
VerdictKind = Literal["better", "worse", "unsure", "plain"]
LIKELY = 0.05
"""The largest p-value of a difference that chance does not explain."""
SHOWN_ROWS = 20
"""Number of rows of a table or chart that are not folded."""
MOST_ROWS = 500
"""Maximum number of rows of a table, folded ones included."""


@dataclass(frozen=True)
class Change:
    """Holds a number before and after as text.

    Args:
        after: The number of the adapted model, or of a model without a base.
        before: The number of the base, or an empty string.
        kind: Whether the change is good.
    """

    after: str
    before: str = ""
    kind: Kind = "same"


@dataclass(frozen=True)
class Verdict:
    """Says in a sentence whether the adapters helped, with what chance allows.

    Args:
        kind: The colour.
        pill: What chance allows, in a few words.
        sentence: The verdict.
        detail: What it rests on, and what to do next.
        command: A command for the next step, or an empty string.
        p: The p-value of the difference, if there is one.
    """

    kind: VerdictKind
    pill: str
    sentence: str
    detail: str = ""
    command: str = ""
    p: float | None = None

    def in_words(self) -> str:
        """Return the sentence with the p-value."""
        return self.sentence if self.p is None else f"{self.sentence.removesuffix('.')} ({p_in_words(self.p)})."


@dataclass(frozen=True)
class Card:
    """Holds one of the numbers at the top of a page."""

    title: str
    change: Change
    note: str = ""


@dataclass(frozen=True)
class Move:
    """Holds a row of the chart of changes.

    Args:
        name: Name of the class, label or part.
        change: The numbers before and after.
        difference: The signed difference as text.
        start: Position of the base in percent of the scale, or `None` without a base.
        end: Position of the adapted model.
        is_focus: Whether the class is in focus.
    """

    name: str
    change: Change
    difference: str
    start: float | None
    end: float
    is_focus: bool = False


@dataclass(frozen=True)
class Moves:
    """Holds the chart of changes: a line from before to after for each row, on a scale from zero.

    Args:
        title: The heading.
        note: What is drawn, and what is left out.
        rows: The rows.
        ticks: Labels of the scale with their positions in percent.
        is_count: Whether the numbers are counts, which are short.
    """

    title: str
    note: str
    rows: list[Move]
    ticks: list[tuple[str, float]]
    is_count: bool = True


@dataclass(frozen=True)
class Cell:
    """Holds a cell of a matrix: its number as text, and its colour from -1 (better) to 1 (worse)."""

    text: str
    shade: float


@dataclass(frozen=True)
class Matrix:
    """Holds a confusion matrix, or the difference of two."""

    title: str
    names: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Dot:
    """Holds a sample of a scatter plot, at a position in the units of the drawing."""

    x: float
    y: float
    kind: Kind


@dataclass(frozen=True)
class Scatter:
    """Holds the errors of samples before (to the right) and after (upwards).

    Args:
        note: What is drawn.
        dots: The samples.
        ticks: Labels with their positions from 0 to 1.
    """

    note: str
    dots: list[Dot]
    ticks: list[tuple[str, float]]


@dataclass(frozen=True)
class Table:
    """Holds a table whose first column has names.

    Args:
        title: The heading.
        caption: What the table contains, for readers who do not see its surroundings.
        columns: Names of the columns.
        rows: Texts, and numbers that changed.
        note: A remark below.
    """

    title: str
    caption: str
    columns: list[str]
    rows: list[list[str | Change]]
    note: str = ""

    @property
    def shown(self) -> list[list[str | Change]]:
        """Return the rows that are not folded."""
        return self.rows if len(self.rows) <= SHOWN_ROWS + 5 else self.rows[:SHOWN_ROWS]

    @property
    def folded(self) -> list[list[str | Change]]:
        """Return the rows that are folded, except those that no page has room for."""
        return self.rows[len(self.shown) : MOST_ROWS]


@dataclass(frozen=True)
class SampleCard:
    """Holds a sample that changed, with the names of its class and of both predictions.

    Args:
        sample: The sample.
        target: Name of its class.
        base_name: Name of the prediction of the base.
        adapted_name: Name of the prediction of the adapted model.
        row: Name of the row of the matrices that counts it.
        base_column: Name of its column in the matrix of the base.
        adapted_column: Name of its column in the matrix of the adapted model.
    """

    sample: ChangedSample
    target: str
    base_name: str
    adapted_name: str
    row: str
    base_column: str
    adapted_column: str


@dataclass(frozen=True)
class Samples:
    """Holds the samples that became wrong or right.

    Args:
        title: The heading.
        kind: Whether they became better or worse.
        count: Number of all such samples.
        cards: Those to draw.
        rows: Those without an image, a text or a signal, as rows of a table.
        indices: Indices in the data set, if nothing else is known.
        columns: Names of the columns of the rows.
    """

    title: str
    kind: Kind
    count: int
    cards: list[SampleCard] = field(default_factory=list)
    rows: list[list[str | Change]] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    columns: tuple[str, ...] = ("sample", "true class", "base", "adapted")

    @property
    def table(self) -> Table:
        """Return the samples that can not be drawn as a table."""
        return Table(self.title, f"{self.title}, by their index in the data set", list(self.columns), self.rows)


@dataclass(frozen=True)
class View:
    """Holds everything that a page shows of one pass over data, or of a training.

    Args:
        title: Which data: `test`, `val`, ....
        subject: How much was counted, in words.
        verdict: The verdict.
        cards: Up to four numbers.
        before: Name of the base in legends, which says if its numbers are chance.
        moves: Where it changed.
        matrices: The difference, the base and the adapted model, or the model alone.
        matrix_note: Which classes the matrices show, or an empty string for all.
        pairs: The confusions that changed most, if the matrices do not show all classes.
        scatter: The samples of a regression.
        samples: Broken samples, then fixed ones.
        tables: The numbers of each class, and others.
        has_base: Whether there is a base.
        read_as: How outputs and targets were read.
        score: The main number, for the table of several runs.
    """

    title: str
    subject: str
    verdict: Verdict
    cards: list[Card]
    before: str = "base"
    moves: Moves | None = None
    matrices: list[Matrix] = field(default_factory=list)
    matrix_note: str = ""
    pairs: Table | None = None
    scatter: Scatter | None = None
    samples: list[Samples] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    has_base: bool = True
    read_as: str = ""
    score: Change = field(default_factory=lambda: Change("–"))


def adapters_in_words(content: Mapping[str, Any]) -> tuple[str, str]:
    """Return what is compared in a report: the adapters that only the adapted model has, and its base."""
    against = content.get("against") or ()
    return ("The other adapters", f"base with {' and '.join(against)}") if against else ("The adapters", "base")


def kind_of(before: float | None, after: float, lower_is_better: bool) -> Kind:
    """Return whether a change is good."""
    if before is None or isnan(before) or isnan(after) or before == after:
        return "same"
    return "better" if (after < before) is lower_is_better else "worse"


def counted(before: int | None, after: int) -> Change:
    """Return a change of a count of errors."""
    return Change(f"{after:,}", "" if before is None else f"{before:,}", kind_of(before, after, True))


def share(before: float | None, after: float) -> Change:
    """Return a change of a share, in percent without the sign."""
    shown = "" if before is None else percent(before)
    return Change(percent(after), shown, kind_of(before, after, False))


def number(before: float | None, after: float, lower_is_better: bool | None = None) -> Change:
    """Return a change of any number. Without knowing what is better, it has no colour."""
    kind: Kind = "same" if lower_is_better is None else kind_of(before, after, lower_is_better)
    if before is None:
        return Change(significant(after))
    texts = [(significant(before, digits), significant(after, digits)) for digits in (3, 4, 5)]
    shown = next((pair for pair in texts if pair[0] != pair[1]), texts[0])
    return Change(shown[1], shown[0], kind)


def percent(value: float) -> str:
    """Return a share in percent, without the sign."""
    return "–" if isnan(value) else f"{100 * value:.1f}"


def significant(value: float | None, digits: int = 3) -> str:
    """Return a number with this number of digits, zeros included, so that the numbers of a column are aligned."""
    if value is None or isnan(value):
        return "–"
    if not value:
        return "0"
    is_whole = 999.5 <= abs(value) < 1e12  # which would be 1e+03 with three digits
    text = f"{value:,.0f}" if is_whole else f"{value:#.{digits}g}".removesuffix(".")
    return text.replace("-", "−")


def p_in_words(p: float) -> str:
    """Return a p-value: `p = 0.076`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def unbroken(text: str) -> str:
    """Return a text whose numbers stay on one line with their arrows and percent signs."""
    return text.replace(" → ", "\u00a0→\u00a0").replace(" %", "\u00a0%")


def signed(value: float, is_count: bool = True) -> str:
    """Return a number with its sign."""
    if not value:
        return "0"
    text = f"{abs(value):,.0f}" if is_count else significant(abs(value))
    return f"{'+' if value > 0 else '−'}{text}"
