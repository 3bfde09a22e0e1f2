"""Writes `report.html` for one or several runs as a single self-contained file."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import isnan
from pathlib import Path
from typing import Any

import torch

from lora_lightning.evaluation import ChangedSample, Confusion, Pairs, Report
from lora_lightning.report.figure import OTHERS, shown_alone, write_png
from lora_lightning.report.files import free_path
from lora_lightning.report.history import History, curves_figure
from lora_lightning.report.samples import read_samples
from lora_lightning.wording import one_line

_LONGEST_NAME = 80
_MARK = '<meta name="generator" content="lora_lightning">'
REPORTS = ("confusion*.json", "comparison*.json")
"""Patterns for the file names of the reports of a run: of classes, and of other tasks."""


def write_page(folders: list[Path], path: Path) -> None:
    """Write the report of the runs in these folders.

    Args:
        folders: Log folders of runs with `confusion*.json`, `samples*.json`, `run.json`, `metrics.csv` and `config.yaml`, as far as
            available.
        path: The file to write.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lora_lightning.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": _count, "percent": _percent}
    runs = [Run(folder) for folder in folders]
    path.write_text(environment.get_template("report.html.j2").render(runs=runs), encoding="utf-8")


def page_of(folder: Path) -> Path:
    """Return the path for the report in a folder. It may replace an earlier report but no other file."""
    path = folder / "report.html"
    is_ours = path.is_file() and _MARK in path.read_text(encoding="utf-8", errors="replace")[:1000]
    return path if is_ours else free_path(path)


class Run:
    """Reads the files in the folder of a run.

    Args:
        folder: The log folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        facts = folder / "run.json"
        self.facts: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {}
        of_classes, of_others = (
            sorted(folder.glob(pattern), key=lambda path: (path.stat().st_mtime, path.name), reverse=True)
            for pattern in REPORTS
        )
        self.sections = [Section(path) for path in of_classes]
        self.comparisons = [NumberSection(path) for path in of_others]

    @property
    def name(self) -> str:
        """Return the last parts of the path of the folder: `adapt/version_0`."""
        return "/".join(self.folder.resolve().parts[-2:])

    @cached_property
    def config(self) -> str:
        """Return the configuration of the run from disk, or an empty string."""
        path = self.folder / "config.yaml"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    @cached_property
    def curves(self) -> str:
        """Return the URL of an image with the curves of the run, or of the training run of its checkpoint."""
        history = next((path for place in self._places if (path := place / "metrics.csv").is_file()), None)
        figure = None if history is None else curves_figure(History.read(history))
        if figure is None:
            return ""
        file = io.BytesIO()
        write_png(figure, file)
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

    @cached_property
    def sizes(self) -> list[tuple[str, int]]:
        """Return the names and sizes in bytes of the files with weights, of the run or of the training run of its checkpoint."""
        for place in self._places:
            found = sorted([*place.glob("adapter*/*.safetensors"), *place.glob("checkpoints/*.ckpt")])
            if found:
                return [(str(path.relative_to(place)), path.stat().st_size) for path in found]
        return []

    @property
    def _places(self) -> list[Path]:
        """Return the folder of the run, and those around its checkpoint."""
        checkpoint = self.facts.get("checkpoint")
        return [self.folder, *(list(Path(checkpoint).parents)[:2] if checkpoint else ())]

    @property
    def trained(self) -> str:
        """Return a description of the number of trained parameters, or an empty string if unknown."""
        trained, total = self.facts.get("trained"), self.facts.get("total")
        if not trained or not total or trained == total:
            return f"{total:,} parameters" if total else ""
        return f"{trained:,} of {total:,} parameters trained, {trained / (total - trained):.2%} of the base"


@dataclass(frozen=True)
class Cell:
    """Holds a cell of a matrix: its number as text, and its colour from -1 to 1."""

    text: str
    shade: float


class Section:
    """Reads the report of one pass over data.

    Args:
        path: The file `confusion*.json`.
    """

    def __init__(self, path: Path) -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = _short_names(content["class_names"])
        base, changed = content.get("base"), content.get("changed")
        samples = path.with_name(path.name.replace("confusion", "samples", 1))
        kept = read_samples(samples) if samples.is_file() else []
        pairs = Pairs(changed["fixed"], changed["broke"], kept, changed["mcnemar_p"] is not None) if changed else None
        model = Confusion(_matrix(content["model"], len(names)), names)
        before = None if base is None else Confusion(_matrix(base, len(names)), names)
        self.report: Report[Confusion] = Report(content["stage"], model, before, pairs=pairs)
        self.title = path.stem.removeprefix("confusion").strip("_-").replace("_", " ") or "test"
        self._shown = self.report.adapted.shown()

    @property
    def names(self) -> list[str]:
        """Return the names of the rows and columns."""
        names = self.report.adapted.class_names
        return [names[index] for index in self._shown] + ([OTHERS] if len(self._shown) < len(names) else [])

    @cached_property
    def matrices(self) -> dict[str, list[list[Cell]]]:
        """Return the cells of the matrices of the base, the model and their difference."""
        found = {"model": shown_alone(self.report.adapted.matrix, self._shown)}
        if self.report.base is not None:
            found = {"base": shown_alone(self.report.base.matrix, self._shown), "adapted": found["model"]}
            found["difference"] = found["adapted"] - found["base"]
        off_diagonal = ~torch.eye(len(self.names), dtype=torch.bool)
        most = max(1, *(int((each * off_diagonal).abs().max()) for each in found.values()))
        return {key: _cells(each, most, signed=key == "difference") for key, each in found.items()}

    @property
    def samples(self) -> list[ChangedSample]:
        """Return the kept samples that changed."""
        return [] if self.report.pairs is None else self.report.pairs.samples

    def name_of(self, index: int) -> str:
        """Return the name of a class."""
        return self.report.adapted.class_names[index]

    def shown_name_of(self, index: int) -> str:
        """Return the name of the row of a class."""
        return self.name_of(index) if index in self._shown else OTHERS

    @property
    def story(self) -> list[str]:
        """Return a summary in up to three sentences."""
        model, base, pairs = self.report.adapted, self.report.base, self.report.pairs
        worst = model.weakest() if model.total else 0
        if base is None:
            return [
                f"The model makes {sum(model.errors):,} errors on {model.total:,} samples: {model.accuracy:.2%} are correct.",
                f"Its weakest class is {self.name_of(worst)!r}: {model.errors[worst]:,} of {model.support[worst]:,} are wrong.",
            ]
        changes = [before - after for before, after in zip(base.errors, model.errors, strict=True)]
        most = max(range(len(changes)), key=lambda index: abs(changes[index]))
        errors = f"{sum(base.errors):,} wrong and the adapted model {sum(model.errors):,}"
        found = [
            f"Of {model.total:,} samples, the base gets {errors}: accuracy {base.accuracy:.2%} → {model.accuracy:.2%}.",
            f"The largest change is in {self.name_of(most)!r}: {base.errors[most]:,} errors before, {model.errors[most]:,} after.",
        ]
        if pairs is not None:
            p = "" if pairs.p is None else f" (McNemar's exact test of base against adapted: p = {pairs.p:.2g})"
            what = "Samples" if pairs.are_independent else "Parts of samples"
            found.append(f"{what} that were fixed: {pairs.fixed:,}; that became wrong: {pairs.broke:,}{p}.")
        return found

    @property
    def classes(self) -> list[dict[str, Any]]:
        """Return a row for each shown class: recall before and after, errors, F1 and false positives."""
        model, base = self.report.adapted, self.report.base
        return [
            {
                "name": self.name_of(index),
                "support": model.support[index],
                "recall": model.recall[index],
                "before": None if base is None else base.recall[index],
                "errors": model.errors[index],
                "errors_before": None if base is None else base.errors[index],
                "f1": model.f1[index],
                "false_positives": model.false_positives[index],
            }
            for index in self._shown
        ]


def _short_names(names: list[str]) -> tuple[str, ...]:
    """Return names that are short enough for every cell of a matrix, and still differ."""
    short = [one_line(name, _LONGEST_NAME) for name in names]
    counts = Counter(short)
    return tuple(f"{name} ({place})" if counts[name] > 1 else name for place, name in enumerate(short))


class NumberSection:
    """Reads the report of one pass over data of a task without classes.

    Args:
        path: The file `comparison*.json`.
    """

    def __init__(self, path: Path) -> None:
        self._content = json.loads(path.read_text(encoding="utf-8"))
        self.title = path.stem.removeprefix("comparison").strip("_-").replace("_", " ") or "test"
        self.read_as: str = self._content["read_as"]
        self.samples: int = self._content["samples"]
        self.has_base = self._content["base"] is not None

    @property
    def story(self) -> list[str]:
        """Return what chance allows, and which samples changed, in up to three sentences."""
        content, found = self._content, []
        if content["bootstrap"] is not None:
            test = content["bootstrap"]
            found.append(
                f"The mean absolute error of a sample changed by {test['difference']:+.4g} (95 % interval {test['low']:+.4g} to "
                f"{test['high']:+.4g}, paired bootstrap over samples, p = {test['p']:.2g})."
            )
        elif content["changed"] is not None:
            changed, p = content["changed"], content["p_value"]
            allowed = "" if p is None else f" (McNemar's exact test: p = {p:.2g})"
            found.append(
                f"Samples that were fixed: {changed['fixed']:,}; that became wrong: {changed['broke']:,}{allowed}."
            )
        for change in ("improved", "worsened"):
            if content[change]:
                found.append(f"The samples that {change} most: {', '.join(map(str, content[change][:10]))}.")
        return found

    @property
    def numbers(self) -> list[tuple[str, str, str]]:
        """Return the name of each number of all samples, its value before and its value."""
        base = self._content["base"] or {}
        found = [
            (name, _significant(base.get(name)), _significant(value))
            for name, value in self._content["model"].items()
            if not isinstance(value, list) and name not in ("samples", "values")
        ]
        return found + [(name, _significant(b), _significant(a)) for name, (a, b) in self._content["metrics"].items()]

    @property
    def rows(self) -> list[dict[str, str]]:
        """Return a row for each label or part of the data, with values before and after."""
        after, before = self._rows(self._content["model"]), self._rows(self._content["base"] or {})
        return [
            {name: _from_to(before[number].get(name) if before else None, value, name) for name, value in row.items()}
            for number, row in enumerate(after)
        ]

    def _rows(self, numbers: dict[str, Any]) -> list[dict[str, Any]]:
        return next((value for value in numbers.values() if isinstance(value, list)), [])


def _significant(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _from_to(before: Any, after: Any, name: str) -> str:
    shown = [each if isinstance(each, str) else _significant(each) for each in (before, after)]
    return shown[1] if before is None or name in ("label", "targets", "support", "samples") else " → ".join(shown)


def _matrix(content: dict[str, Any], size: int) -> torch.Tensor:
    if content["matrix"] is not None:
        return torch.tensor(content["matrix"])
    matrix = torch.zeros(size, size, dtype=torch.int64)
    for target, predicted, count in content["counts"]:
        matrix[target, predicted] = count
    return matrix


def _cells(matrix: torch.Tensor, most: int, *, signed: bool) -> list[list[Cell]]:
    rows = []
    for row, counts in enumerate(matrix.tolist()):
        cells = []
        for column, count in enumerate(counts):
            # Higher is better on the diagonal, lower is better elsewhere.
            shade = count / most * (-1 if row == column else 1) if signed or row != column else 0.0
            cells.append(Cell(f"{count:+,}" if signed and count else f"{count:,}" if count else "", _bounded(shade)))
        rows.append(cells)
    return rows


def _bounded(shade: float) -> float:
    return max(-1.0, min(1.0, shade))


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,}"


def _percent(value: float | None) -> str:
    return "–" if value is None or isnan(value) else f"{value:.1%}"
