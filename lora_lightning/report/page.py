"""Writes `report.html` for one or several runs as a single self-contained file."""

from __future__ import annotations

import json
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lightning.report.charts import Panel, signal_points
from lora_lightning.report.class_view import ClassView
from lora_lightning.report.files import free_path
from lora_lightning.report.fit_view import FitView
from lora_lightning.report.history import History
from lora_lightning.report.number_view import NumberView
from lora_lightning.report.view import View, significant, unbroken

if TYPE_CHECKING:  # importing it takes time, and most commands write no page
    from jinja2 import Template

_MARK = '<meta name="generator" content="lora_lightning">'
REPORTS = ("confusion*.json", "comparison*.json")
"""Patterns for the file names of the reports of a run: of classes, and of other tasks."""


def write_page(folders: list[Path], path: Path) -> None:
    """Write the report of the runs in these folders.

    Args:
        folders: Log folders of runs with `confusion*.json`, `samples*.json`, `run.json`, `metrics.csv` and
            `config.yaml`, as far as available.
        path: The file to write.
    """
    text = _template().render(runs=[Run(folder) for folder in folders])
    path.write_text(text, encoding="utf-8")


@cache  # compiling it takes longer than what else a page needs
def _template() -> Template:
    """Return the template of the page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lora_lightning.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"significant": significant, "signal": signal_points, "unbroken": unbroken}
    return environment.get_template("report.html.j2")


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
        self.views: list[View] = [ClassView.read(path, self.facts).view() for path in of_classes]
        self.views += [NumberView.read(path, self.facts).view() for path in of_others]
        if not self.views and self._fit is not None:
            self.views = [self._fit.view()]

    @property
    def name(self) -> str:
        """Return the last parts of the path of the folder: `adapt/version_0`, or those of a repair."""
        return "/".join(self.folder.resolve().parts[-3 if self.facts.get("repair") else -2 :])

    @cached_property
    def config(self) -> str:
        """Return the configuration of the run from disk, or an empty string."""
        path = self.folder / "config.yaml"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    @cached_property
    def _fit(self) -> FitView | None:
        """Return the training of the run, or that of its checkpoint."""
        history = next((path for place in self._places if (path := place / "metrics.csv").is_file()), None)
        return None if history is None else FitView(History.read(history), self.facts)

    @property
    def curves(self) -> list[Panel]:
        """Return the curves of the training."""
        return [] if self._fit is None else self._fit.panels

    @property
    def is_fit(self) -> bool:
        """Return whether the page is the summary of a training."""
        return [view.title for view in self.views] == ["fit"]

    @cached_property
    def sizes(self) -> list[tuple[str, int]]:
        """Return names and sizes in bytes of the files with weights, of the run or of its checkpoint's training."""
        for place in self._places:
            found = sorted([*place.glob("adapter*/*.safetensors"), *place.glob("checkpoints/*.ckpt")])
            if found:
                return [(str(path.relative_to(place)), path.stat().st_size) for path in found]
        return []

    @property
    def adapted(self) -> str:
        """Return the adapted layers in words, `3 layers, rank 8`, or an empty string without adapters."""
        ranks = sorted({layer["rank"] for layer in self.facts.get("layers") or []})
        if not ranks:
            return ""
        count = len(self.facts["layers"])
        rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        return f"{count:,} layer{'s' if count > 1 else ''}, rank {rank}"

    @property
    def adapter(self) -> str:
        """Return the folder of the adapters, or an empty string."""
        repair = self.facts.get("repair") or {}
        if found := repair.get("adapter"):
            return str(found)
        return next((str(place / "adapter") for place in self._places if (place / "adapter").is_dir()), "")

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
            return f"{total:,}" if total else ""
        return f"{trained:,}, {trained / (total - trained):.2%} of the {total - trained:,} that are frozen"
