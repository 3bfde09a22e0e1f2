"""Writes the samples that changed as a file, and draws them in a grid."""

from __future__ import annotations

import base64
import io
import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lightning.evaluation import ChangedSample
from lora_lightning.wording import one_line

if TYPE_CHECKING:  # matplotlib takes half a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 6
_TEXT = 11
"""Size of text in points, so that it can be read at half the size of the image."""
_DRAWN = 12
_WIDTH, _HEIGHT, _WORDS, _SIDE = 2.1, 2.75, 0.72, 1.8
"""Sizes in inches: of a sample with its caption, of the caption, and of the longer side of an image."""
_LONGEST_NAME = 16
_SHORT_NAME = 8
_BETTER, _WORSE = "#1d5fd1", "#a84a05"
"""The blue and the orange of the page."""


def write_samples(samples: list[ChangedSample], path: Path) -> None:
    """Write samples as JSON, and signals with four digits."""
    rows = [asdict(each) | {"signal": [float(f"{value:.4g}") for value in each.signal]} for each in samples]
    path.write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")


def read_samples(path: Path) -> list[ChangedSample]:
    """Read the file from `write_samples`."""
    return [ChangedSample(**each) for each in json.loads(path.read_text(encoding="utf-8"))]


def by_turns(samples: Sequence[ChangedSample]) -> list[ChangedSample]:
    """Return the samples with one of each class in turn, since data sets are often sorted by class."""
    taken: Counter[int] = Counter()
    turns = []
    for sample in samples:
        turns.append(taken[sample.target])
        taken[sample.target] += 1
    return [
        samples[place] for place in sorted(range(len(samples)), key=lambda place: (turns[place], samples[place].target))
    ]


def samples_figure(samples: list[ChangedSample], class_names: tuple[str, ...]) -> Figure | None:
    """Return a figure with up to twelve broken and twelve fixed samples, with their predictions and confidences.

    Returns:
        The figure, or `None` if no sample has an image or a text.
    """
    from matplotlib.figure import Figure

    shown = [each for each in samples if each.image or each.text]
    kinds = [by_turns([each for each in shown if each.is_fixed is kind])[:_DRAWN] for kind in (False, True)]
    rows = [-(-len(kind) // _COLUMNS) for kind in kinds]
    if not sum(rows):
        return None
    figure = Figure(figsize=(_WIDTH * _COLUMNS, _HEIGHT * sum(rows)))
    # One axis for all samples, in inches, since one axis per sample takes longer than the rest of a report.
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    for kind, first_row in zip(kinds, (0, rows[0]), strict=True):
        for number, each in enumerate(kind):
            row, column = divmod(number, _COLUMNS)
            _draw(axis, each, class_names, _WIDTH * (column + 0.5), _HEIGHT * (first_row + row))
    axis.set(xlim=(0, _WIDTH * _COLUMNS), ylim=(_HEIGHT * sum(rows), 0), aspect="auto")
    return figure


def _draw(axis: Axes, sample: ChangedSample, class_names: tuple[str, ...], center: float, top: float) -> None:
    """Draw a sample below its three lines of text. Positions are in inches from the upper left corner."""
    from PIL import Image

    target, base, model = (_short(class_names[index]) for index in (sample.target, sample.base, sample.model))
    is_short = max(map(len, (target, base, model))) < _SHORT_NAME
    before, after = ("base: ", "adapted: ") if is_short else ("", "→ ")
    axis.text(
        center,
        top + 0.1,
        f"{'fixed' if sample.is_fixed else 'broken'}: is {target}\n{before}{base}, {sample.base_confidence:.0%}\n"
        f"{after}{model}, {sample.confidence:.0%}",
        ha="center",
        va="top",
        fontsize=_TEXT if is_short else 9,
        color=_BETTER if sample.is_fixed else _WORSE,
    )
    middle = top + _WORDS + _SIDE / 2
    if sample.image:
        pixels = Image.open(io.BytesIO(base64.b64decode(sample.image.partition(",")[2])))
        half = [_SIDE / 2 * size / max(pixels.size) for size in pixels.size]
        extent = (center - half[0], center + half[0], middle + half[1], middle - half[1])
        axis.imshow(pixels, cmap="gray", interpolation="nearest", extent=extent)
    else:
        text = "\n".join(textwrap.wrap(textwrap.shorten(sample.text, 110), 20)).replace("$", r"\$")
        axis.text(center, middle, text, ha="center", va="center", fontsize=_TEXT)


def _short(name: str) -> str:
    return one_line(name, _LONGEST_NAME).replace("$", r"\$")  # otherwise matplotlib would parse it as mathematics
