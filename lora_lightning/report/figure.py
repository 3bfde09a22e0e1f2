"""The confusion figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lora_lightning.report.confusion import Report

if TYPE_CHECKING:  # matplotlib takes half a second to import, and most runs never draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LONGEST_LABEL = 24


def confusion_figures(report: Report) -> dict[str, Figure]:
    """Return the confusion matrix as a figure, `model`; with a base: `base`, `adapted` and their `difference`.

    Colour follows the errors, which the diagonal would drown out, on one scale for all; the numbers are counts. Of more
    than 20 classes, the 20 of lowest recall have a row and a column each, and all others have one together.
    """
    shown = report.model.shown()
    names = tuple(report.model.class_names[index] for index in shown)
    if len(names) < len(report.model.class_names):
        names += ("others",)
    model = _shown_alone(report.model.matrix, shown)
    panels = {"model": model}
    if report.base is not None:
        base = _shown_alone(report.base.matrix, shown)
        panels = {"base": base, "adapted": model, "difference": model - base}
    beside_diagonal = ~torch.eye(len(names), dtype=torch.bool)
    most_errors = max(int((matrix * beside_diagonal).abs().max()) for matrix in panels.values())
    return {title: _figure(title, matrix, names, most_errors) for title, matrix in panels.items()}


def _shown_alone(matrix: torch.Tensor, shown: list[int]) -> torch.Tensor:
    """Return the counts of these classes, with all others together in a last row and column if there are others."""
    size = len(shown) + (len(shown) < len(matrix))
    place = torch.full((len(matrix),), size - 1)
    place[shown] = torch.arange(len(shown))
    rows = torch.zeros(size, len(matrix), dtype=matrix.dtype).index_add_(0, place, matrix)
    return torch.zeros(size, size, dtype=matrix.dtype).index_add_(1, place, rows)


def _figure(title: str, matrix: torch.Tensor, names: tuple[str, ...], most_errors: int) -> Figure:
    from matplotlib.figure import Figure

    side = 6 if len(names) <= 12 else 9
    figure = Figure(figsize=(side, side), layout="constrained")
    _draw(figure.subplots(), title, matrix, names, most_errors, diverging=title == "difference")
    return figure


def _draw(
    axis: Axes, title: str, matrix: torch.Tensor, names: tuple[str, ...], most_errors: int, *, diverging: bool
) -> None:
    size, scale = len(names), max(most_errors, 1)
    shade = matrix.double()
    if diverging:
        # On the diagonal more is better, beside it less is: blue is better, red is worse.
        shade = torch.where(torch.eye(size, dtype=torch.bool), -shade, shade)
        axis.imshow(shade.numpy(), cmap="RdBu_r", vmin=-scale, vmax=scale)
    else:
        shade = shade.masked_fill(torch.eye(size, dtype=torch.bool), 0)
        axis.imshow(shade.numpy(), cmap="Reds", vmin=0, vmax=scale)
    heading = "difference (adapted - base)" if diverging else title
    axis.set(title=heading, xlabel="predicted", ylabel="target")
    labels = [name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}…" for name in names]
    slanted: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(range(size), labels, **(slanted if max(map(len, labels)) > 2 else {}))
    axis.set_yticks(range(size), labels)
    for row in range(size):
        for column in range(size):
            count = int(matrix[row, column])
            if count:
                dark = abs(float(shade[row, column])) > 0.6 * scale
                label = f"{count:+d}" if diverging else str(count)
                weight = "bold" if row == column else "normal"
                axis.text(
                    column,
                    row,
                    label,
                    ha="center",
                    va="center",
                    fontsize=8 if len(label) <= 4 else 6,
                    color="white" if dark else "black",
                    weight=weight,
                )
