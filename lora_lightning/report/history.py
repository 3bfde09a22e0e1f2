"""Records the logged metrics of a run by step, and writes `metrics.csv` and the curves."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lightning.wording import one_line

if TYPE_CHECKING:  # matplotlib takes half a second to import
    from matplotlib.figure import Figure

_STEP = "step"
_GREY = "#767676"


class History:
    """Holds the metrics of a run by step.

    Args:
        rows: Metrics by name, for each step.
    """

    def __init__(self, rows: Mapping[int, Mapping[str, float]] | None = None) -> None:
        self.rows: dict[int, dict[str, float]] = {step: dict(row) for step, row in (rows or {}).items()}

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics to those of a step."""
        self.rows.setdefault(step, {}).update(metrics)

    def write(self, path: Path) -> None:
        """Write one row per step and one column per metric."""
        names = list(dict.fromkeys(name for row in self.rows.values() for name in row))
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [_STEP, *names])
            writer.writeheader()
            writer.writerows({_STEP: step, **row} for step, row in sorted(self.rows.items()))

    @classmethod
    def read(cls, path: Path) -> History:
        """Read the file from `write`, or from Lightning's `CSVLogger`, which has several rows per step."""
        history = cls()
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                history.record(
                    int(row[_STEP]), {key: float(each) for key, each in row.items() if key != _STEP and each}
                )
        return history

    def curves(self) -> dict[str, dict[str, list[tuple[int, float]]]]:
        """Return the points of each metric with at least two values, grouped by measure, such as `loss`.

        `train/loss`, `train_loss` and `val/loss` are the same measure. Metrics of single classes, such as
        `val/recall/9`, are excluded.
        """
        found: dict[str, dict[str, list[tuple[int, float]]]] = {}
        names = dict.fromkeys(name for row in self.rows.values() for name in row)
        for name in names:
            points = [
                (step, row[name]) for step, row in sorted(self.rows.items()) if isfinite(row.get(name, float("nan")))
            ]
            if len(points) > 1 and name.count("/") < 2 and name != "epoch":
                found.setdefault(_measure(name), {})[name] = points
        return found


def _measure(name: str) -> str:
    for stage in ("train", "val"):
        name = name.removeprefix(f"{stage}/").removeprefix(f"{stage}_")
    return name.removesuffix("_step").removesuffix("_epoch")


def curves_figure(history: History) -> Figure | None:
    """Return a figure with one panel per measure, for light and dark backgrounds, or `None` without curves."""
    from matplotlib.figure import Figure

    curves = history.curves()
    if not curves:
        return None
    columns = min(len(curves), 3)
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained", facecolor="none")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (measure, lines) in zip(axes, curves.items(), strict=False):
        for name, points in lines.items():
            marker = "" if len(points) > 30 else "."
            axis.plot([step for step, _ in points], [value for _, value in points], marker=marker, label=name)
        axis.set_title(one_line(measure, 32).replace("$", r"\$"), color=_GREY, fontsize=15)
        axis.set_xlabel(_STEP, color=_GREY, fontsize=12)
        axis.set_facecolor("none")
        axis.tick_params(colors=_GREY, labelsize=12)
        for spine in axis.spines.values():
            spine.set_color(_GREY)
        if len(lines) > 1:
            axis.legend(fontsize=12, framealpha=0, labelcolor=_GREY)
    for axis in list(figure.axes)[len(curves) :]:
        axis.set_visible(False)
    return figure
