"""Draws the figures of a report."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from lora_lightning.evaluation import Confusion, Report
from lora_lightning.report.samples import samples_figure
from lora_lightning.wording import one_line

if TYPE_CHECKING:  # matplotlib takes half a second to import, and most runs never draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LONGEST_LABEL = 24
_TITLE, _TEXT = 16, 13
"""Sizes of text in points, so that it can be read at half the size of the image."""
OTHERS = "others"
"""Name of the row for all classes that are not shown individually."""


def confusion_figures(report: Report[Confusion]) -> dict[str, Figure]:
    """Return the confusion matrix as the figure `model`, or with a base as `base`, `adapted` and their `difference`.

    The numbers are counts. The colours show the errors on one scale for all figures, without the diagonal, which would
    dominate. For more than 20 classes, the 20 with the lowest recall have one row and column each, and all others share
    one.
    """
    shown = report.adapted.shown()
    names = _names(report, shown)
    model = report.adapted.of_classes(shown)
    panels = {"model": model}
    if report.base is not None:
        base = report.base.of_classes(shown)
        panels = {"base": base, "adapted": model, "difference": model - base}
    most_errors = _most(*panels.values())
    return {title: _figure(title, matrix, names, most_errors) for title, matrix in panels.items()}


def classes_figure(report: Report[Confusion]) -> Figure:
    """Return a bar chart with the recall of each shown class for the model and its base."""
    from matplotlib.figure import Figure

    shown = report.adapted.shown()
    names = [_label(report.adapted.class_names[index]) for index in shown]
    figure = Figure(figsize=(7, 1.2 + 0.4 * len(shown)), layout="constrained")
    axis = figure.subplots()
    both = {"model": report.adapted} if report.base is None else {"base": report.base, "adapted": report.adapted}
    height = 0.8 / len(both)
    for number, (title, confusion) in enumerate(both.items()):
        places = [row + (number - (len(both) - 1) / 2) * height for row in range(len(shown))]
        axis.barh(places, [100 * confusion.recall[index] for index in shown], height, label=title)
    axis.set_yticks(range(len(shown)), names)
    axis.invert_yaxis()
    axis.set(xlim=(0, 100))
    axis.set_xlabel("recall, %", fontsize=_TEXT)
    axis.tick_params(labelsize=_TEXT)
    axis.legend(loc="lower left", fontsize=_TEXT)
    return figure


def write_png(figure: Figure, target: Path | IO[bytes]) -> None:
    """Write a figure as PNG. It is drawn once, while `savefig` draws it twice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(target, pil_kwargs={"compress_level": 1})
    figure.set_layout_engine("none")  # keeps the layout for loggers that draw the figure again


def _label(name: str) -> str:
    """Return a shortened name without the sign that starts mathematics in matplotlib."""
    return one_line(name, _LONGEST_LABEL).replace("$", r"\$")


def report_figures(report: Report[Confusion]) -> dict[str, Figure]:
    """Return the figures that are written.

    These are `confusion` with the base, if any, and the model side by side; `confusion_normalized`, the same in percent
    of each row, unless all classes have equally many samples, where it would be the same figure; `difference`, if there
    is a base; and `mistakes`, if samples with an image or a text changed.
    """
    shown = report.adapted.shown()
    names = _names(report, shown)
    matrices = {} if report.base is None else {"base": report.base.of_classes(shown)}
    matrices["adapted" if matrices else "model"] = report.adapted.of_classes(shown)
    percents = {key: 100 * each / each.sum(1, keepdim=True).clamp_min(1) for key, each in matrices.items()}
    found = {"confusion": _side_by_side(matrices, names)}
    if len({support for support in report.adapted.support if support}) > 1:
        found["confusion_normalized"] = _side_by_side(percents, names, ", % of each row")
    if report.base is not None:
        difference = matrices["adapted"] - matrices["base"]
        found["difference"] = _figure("difference", difference, names, _most(difference))
    if report.pairs is not None:
        mistakes = samples_figure(report.pairs.samples, report.adapted.class_names)
        found |= {} if mistakes is None else {"mistakes": mistakes}
    return found


def _names(report: Report[Confusion], shown: list[int]) -> tuple[str, ...]:
    names = tuple(report.adapted.class_names[index] for index in shown)
    return names if len(names) == len(report.adapted.class_names) else (*names, OTHERS)


def _most(*matrices: torch.Tensor) -> float:
    """Return the largest off-diagonal count."""
    off_diagonal = ~torch.eye(len(matrices[0]), dtype=torch.bool)
    return max(float((matrix * off_diagonal).abs().max()) for matrix in matrices)


def _side_by_side(matrices: dict[str, torch.Tensor], names: tuple[str, ...], unit: str = "") -> Figure:
    from matplotlib.figure import Figure

    side, most = _side(names), _most(*matrices.values())
    figure = Figure(figsize=(side * len(matrices), side), layout="constrained")
    _leave_margin(figure)
    axes = figure.subplots(1, len(matrices), squeeze=False).flat
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=True):
        _draw(axis, f"{title}{unit}", matrix, names, most, diverging=False)
    return figure


def _leave_margin(figure: Figure) -> None:
    """Leave room around titles, so that none touches the border."""
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.12, h_pad=0.12)


def _side(names: tuple[str, ...]) -> float:
    """Return the side of a matrix with its labels in inches."""
    return 6.5 if len(names) <= 12 else 11


def _figure(title: str, matrix: torch.Tensor, names: tuple[str, ...], most_errors: float) -> Figure:
    from matplotlib.figure import Figure

    side = _side(names)
    figure = Figure(figsize=(side, side), layout="constrained")
    _leave_margin(figure)
    _draw(figure.subplots(), title, matrix, names, most_errors, diverging=title == "difference")
    return figure


def _draw(
    axis: Axes, title: str, matrix: torch.Tensor, names: tuple[str, ...], most_errors: float, *, diverging: bool
) -> None:
    size, scale = len(names), max(most_errors, 1)
    shade = matrix.double()
    if diverging:
        # Higher is better on the diagonal, lower is better elsewhere: blue is better, red is worse.
        shade = torch.where(torch.eye(size, dtype=torch.bool), -shade, shade)
        axis.imshow(shade.numpy(), cmap="RdBu_r", vmin=-scale, vmax=scale)
    else:
        shade = shade.masked_fill(torch.eye(size, dtype=torch.bool), 0)
        axis.imshow(shade.numpy(), cmap="Reds", vmin=0, vmax=scale)
    axis.set_title("difference: adapted − base" if diverging else title, fontsize=_TITLE)
    axis.set_xlabel("predicted", fontsize=_TEXT)
    axis.set_ylabel("target", fontsize=_TEXT)
    axis.tick_params(labelsize=_TEXT)
    labels = [_label(name) for name in names]
    slanted: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(range(size), labels, **(slanted if max(map(len, labels)) > 2 else {}))
    axis.set_yticks(range(size), labels)
    for row in range(size):
        for column in range(size):
            value = float(matrix[row, column])
            count = round(value)
            if value:
                dark = abs(float(shade[row, column])) > 0.6 * scale
                label = f"{count:+d}" if diverging else str(count) if count or value == count else "<1"
                weight = "bold" if row == column else "normal"
                # The text is inside the axes, so the layout does not have to measure it.
                cell = axis.text(
                    column,
                    row,
                    label,
                    ha="center",
                    va="center",
                    fontsize=_text_size(label, size),
                    color="white" if dark else "black",
                    weight=weight,
                    parse_math=False,
                )
                cell.set_in_layout(False)


def _text_size(label: str, size: int) -> float:
    """Return the size of a number in points that fits a cell of a matrix with this number of rows."""
    cell = 72 * (0.46 if size <= 12 else 0.4) * min(1.0, (12 if size <= 12 else 21) / size)
    if size <= 5:
        cell = 60
    return min(14, max(6, cell / (0.68 * max(len(label), 2))))
