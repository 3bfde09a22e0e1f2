"""The confusion figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lora_lightning.report.confusion import Report

if TYPE_CHECKING:  # matplotlib takes half a second to import, and most runs never draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_ANNOTATED_CLASSES = 20


def confusion_figures(report: Report) -> dict[str, Figure]:
    """The confusion matrix as a picture, `model`; with a base: `base`, `adapted` and their `difference`.

    Colour follows the errors, which the diagonal would drown out, on one scale for all; the numbers are counts. Above
    20 classes the numbers are left out.
    """
    panels = {"model": report.model.matrix}
    if report.base is not None:
        difference = report.model.matrix - report.base.matrix
        panels = {"base": report.base.matrix, "adapted": report.model.matrix, "difference": difference}
    names = report.model.class_names
    beside_diagonal = ~torch.eye(len(names), dtype=torch.bool)
    most_errors = max(int((matrix * beside_diagonal).abs().max()) for matrix in panels.values())
    return {title: _figure(title, matrix, names, most_errors) for title, matrix in panels.items()}


def _figure(title: str, matrix: torch.Tensor, names: tuple[str, ...], most_errors: int) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), layout="constrained")
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
    if size > _MOST_ANNOTATED_CLASSES:
        return
    axis.set_xticks(range(size), names, rotation=0 if max(map(len, names)) <= 2 else 60)
    axis.set_yticks(range(size), names)
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
                    fontsize=8,
                    color="white" if dark else "black",
                    weight=weight,
                )
