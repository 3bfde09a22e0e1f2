"""Writes samples that changed, as a file and as a grid of images and texts."""

from __future__ import annotations

import base64
import io
import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lightning.report.changes import ChangedSample

if TYPE_CHECKING:  # matplotlib takes half a second to import
    from matplotlib.figure import Figure

_COLUMNS = 6
_DRAWN = 12
_LONGEST_NAME = 22


def write_samples(samples: list[ChangedSample], path: Path) -> None:
    """Write samples as JSON."""
    path.write_text(json.dumps([asdict(each) for each in samples], indent=0) + "\n", encoding="utf-8")


def read_samples(path: Path) -> list[ChangedSample]:
    """Return what `write_samples` wrote."""
    return [ChangedSample(**each) for each in json.loads(path.read_text(encoding="utf-8"))]


def samples_figure(samples: list[ChangedSample], class_names: tuple[str, ...]) -> Figure | None:
    """Return up to twelve samples that were fixed and as many that broke: what they are, and how sure the model is.

    Returns:
        The figure; `None` if no sample has an image or a text.
    """
    from matplotlib.figure import Figure
    from PIL import Image

    shown = [each for each in samples if each.image or each.text]
    kinds = [[each for each in shown if each.is_fixed is kind][:_DRAWN] for kind in (True, False)]
    rows = [-(-len(kind) // _COLUMNS) for kind in kinds]
    if not sum(rows):
        return None
    figure = Figure(figsize=(1.9 * _COLUMNS, 2.5 * sum(rows)), layout="constrained")
    axes = figure.subplots(sum(rows), _COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for place, each in [
        *enumerate(kinds[0]),
        *((rows[0] * _COLUMNS + number, each) for number, each in enumerate(kinds[1])),
    ]:
        axis = axes.flat[place]
        if each.image:
            pixels = Image.open(io.BytesIO(base64.b64decode(each.image.partition(",")[2])))
            axis.imshow(pixels, cmap="gray", interpolation="nearest")
        else:
            text = "\n".join(textwrap.wrap(textwrap.shorten(each.text, 110), 22)).replace("$", r"\$")
            axis.text(0.5, 0.5, text, ha="center", va="center", fontsize=7)
        target, base, model = (_short(class_names[index]) for index in (each.target, each.base, each.model))
        what = "fixed" if each.is_fixed else "broke"
        axis.set_title(
            f"{what}: {target}\n{base} {each.base_confidence:.0%}\n→ {model} {each.confidence:.0%}",
            fontsize=7,
            color="tab:blue" if each.is_fixed else "tab:red",
        )
    return figure


def _short(name: str) -> str:
    short = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
    return short.replace("$", r"\$")  # which matplotlib would take for mathematics
