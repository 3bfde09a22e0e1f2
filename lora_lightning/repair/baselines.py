"""Compares a repair with baselines that use the same base, batches and number of steps."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.table import Table

from lora_lightning.repair.predictions import Predictions, Tally, mcnemar

if TYPE_CHECKING:  # matplotlib takes half a second to import
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Row:
    """Holds one line of the comparison, on test data.

    Args:
        name: Name of the method.
        tally: The errors.
        parameters: Number of trained parameters.
        seconds: Training time.
        p: McNemar's p-value against the base.
    """

    name: str
    tally: Tally
    parameters: int
    seconds: float
    p: float

    @classmethod
    def of(
        cls, name: str, base: Predictions, after: Predictions, focus: tuple[int, ...], parameters: int, seconds: float
    ) -> Row:
        """Compare the predictions on test data with those of the base."""
        return cls(name, after.tally(focus), parameters, seconds, mcnemar(base, after))


def comparison_table(rows: list[Row], focus: str) -> Table:
    """Return the comparison as a table for the terminal."""
    title = f"Errors on test data: on {focus} (focus), on others, and those taken for {focus}"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for heading in ("focus", "others", "taken", "acc. %", "trained", "s", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        tally = row.tally
        counts = (tally.focus_errors, tally.other_errors, tally.false_positives)
        numbers = [f"{count:,}" for count in counts] + [f"{100 * tally.accuracy:.2f}", _short(row.parameters)]
        table.add_row(row.name, *numbers, f"{row.seconds:.0f}", "<.001" if row.p < 0.001 else f"{row.p:.3f}")
    return table


def _short(count: int) -> str:
    """Return 20010 as `20 k` and 2807010 as `2.81 M`."""
    if count < 1000:
        return str(count)
    return f"{count / 1000:.0f} k" if count < 1_000_000 else f"{count / 1_000_000:.2f} M"


def write_comparison(rows: list[Row], curves: Mapping[str, list[Tally]], focus: str, folder: Path) -> None:
    """Write `baselines.json`, `baselines.csv` and `tradeoff.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = [{**asdict(row), "accuracy": row.tally.accuracy} for row in rows]
    content = {
        "focus": focus,
        "rows": plain,
        "curves": {name: [asdict(tally) for tally in tallies] for name, tallies in curves.items()},
    }
    (folder / "baselines.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    with (folder / "baselines.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["name", "focus_errors", "other_errors", "false_positives", "accuracy", "parameters", "seconds", "p"]
        )
        for row in rows:
            tally = row.tally
            counts = [tally.focus_errors, tally.other_errors, tally.false_positives]
            writer.writerow([row.name, *counts, tally.accuracy, row.parameters, f"{row.seconds:.3f}", row.p])
    tradeoff_figure(rows, curves, focus).savefig(folder / "tradeoff.png", dpi=120)


def tradeoff_figure(rows: list[Row], curves: Mapping[str, list[Tally]], focus: str) -> Figure:
    """Return a plot of the errors on the focus and all other errors, where left and below the base is better."""
    from matplotlib.figure import Figure  # it takes half a second, and only --baselines needs it

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, tallies in curves.items():
        others = [tally.other_errors for tally in tallies]
        axis.plot(others, [tally.focus_errors for tally in tallies], "-", alpha=0.6, label=name)
    for place, row in enumerate(rows):
        marker = "o" if place else "*"
        axis.plot(row.tally.other_errors, row.tally.focus_errors, marker, markersize=8 if place else 14, label=row.name)
    base = rows[0].tally
    axis.axvline(base.other_errors, color="grey", linewidth=0.8, linestyle=":")
    axis.axhline(base.focus_errors, color="grey", linewidth=0.8, linestyle=":")
    shown = [row.tally.other_errors for row in rows]
    margin = 0.1 * (max(shown) - min(shown)) + 5
    axis.set(
        xlabel="errors on all other classes", ylabel=f"errors on {focus}", title="Test data; left and below is better"
    )
    axis.set_xlim(min(shown) - margin, max(shown) + margin)
    axis.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
