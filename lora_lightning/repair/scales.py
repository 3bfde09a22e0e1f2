"""Shows the errors on validation data at each scale λ of the adapters, W + λ ΔW."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.table import Table

from lora_lightning.repair.answers import Tally

if TYPE_CHECKING:  # matplotlib takes half a second to import
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Setting:
    """Describes a candidate: adapters with a rank, a share of the focus in training, and a scale.

    Args:
        rank: Rank of the adapters.
        share: Share of the focus, or `None` for existing adapters.
        scale: Scale λ.
    """

    rank: int
    share: float | None
    scale: float

    def adapters_in_words(self) -> str:
        """Return the rank and the share: `rank 8, share 15%`."""
        return f"rank {self.rank}" if self.share is None else f"rank {self.rank}, share {self.share:.0%}"


def scales_table(base: Tally, found: Mapping[Setting, Tally], focus: str) -> Table:
    """Return the errors at each scale as a table for the terminal, where scale 0 is the base."""
    table = Table(title="Validation data", title_justify="left", box=SIMPLE, pad_edge=False)
    for heading in ("scale", f"errors on {focus}", "on others", f"taken for {focus}", "accuracy %"):
        table.add_column(heading, justify="right")
    for scale, tally in [(0.0, base), *((setting.scale, tally) for setting, tally in found.items())]:
        counts = [f"{count:,}" for count in (tally.focus_errors, tally.other_errors, tally.false_positives)]
        table.add_row(f"{scale:g}", *counts, f"{100 * tally.accuracy:.2f}")
    return table


def write_scales(base: Tally, found: Mapping[Setting, Tally], focus: str, folder: Path) -> None:
    """Write `scales.csv` and `scales.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "scales.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["rank", "share", "scale", "focus_errors", "other_errors", "false_positives", "accuracy"])
        writer.writerow(["", "", 0, base.focus_errors, base.other_errors, base.false_positives, base.accuracy])
        for setting, tally in found.items():
            share = "" if setting.share is None else setting.share
            counts = [tally.focus_errors, tally.other_errors, tally.false_positives, tally.accuracy]
            writer.writerow([setting.rank, share, setting.scale, *counts])
    _figure(base, found, focus).savefig(folder / "scales.png", dpi=120)


def _figure(base: Tally, found: Mapping[Setting, Tally], focus: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves: dict[str, list[tuple[float, Tally]]] = {}
    for setting, tally in found.items():
        curves.setdefault(setting.adapters_in_words(), [(0.0, base)]).append((setting.scale, tally))
    for name, points in curves.items():
        scales = [scale for scale, _ in points]
        left.plot(scales, [tally.focus_errors for _, tally in points], "o-", markersize=4, label=name)
        right.plot(scales, [tally.other_errors for _, tally in points], "o-", markersize=4, label=name)
    left.set(xlabel="scale λ of the adapters", ylabel=f"errors on {focus}", ylim=(0, None))
    right.set(xlabel="scale λ of the adapters", ylabel="errors on all others")
    right.legend(fontsize=8)
    figure.suptitle("Validation data; 0 is the base", fontsize=10)
    return figure
