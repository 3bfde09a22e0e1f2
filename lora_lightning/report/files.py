"""Writes reports to disk, and finds unused file names."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec

from lora_lightning.report.changes import Pairs
from lora_lightning.report.confusion import Report
from lora_lightning.report.figure import report_figures, write_png
from lora_lightning.report.samples import write_samples

if TYPE_CHECKING:  # matplotlib takes half a second to import
    from matplotlib.figure import Figure

_IMAGES = ("confusion", "confusion_normalized", "difference", "mistakes")
_QUANTITIES = ("errors", "recall", "precision", "f1", "false_positives")


def write_report(report: Report, folder: str | Path, figures: dict[str, Figure] | None = None) -> dict[str, str]:
    """Write a report to `folder` without overwriting files. The names contain `_val` for a validation.

    Args:
        report: The report.
        folder: A folder, which is created if necessary, or a URL such as `s3://…`.
        figures: The result of `report_figures`, if available.

    Returns:
        The paths of the files by their plain names: `confusion.json` with all numbers, `confusion.csv` with one row per class, the images
        `confusion.png`, `confusion_normalized.png` and, with a base, `difference.png`. If samples changed, also `samples.json` and
        `mistakes.png`.
    """
    ending = "" if report.stage == "test" else f"_{report.stage}"
    ending += report.suffix.replace("/", "_")
    version = Path(free_name(folder, f"confusion{ending}.json")).stem.removeprefix("confusion")
    writers: dict[str, Callable[[Path], object]] = {
        "confusion.json": lambda path: _write_json(report, path),
        "confusion.csv": lambda path: _write_csv(report, path),
    }
    samples = [] if report.pairs is None else report.pairs.samples
    if samples:
        writers["samples.json"] = lambda path: write_samples(samples, path)
    figures = report_figures(report) if figures is None else figures
    for name in filter(figures.__contains__, _IMAGES):
        writers[f"{name}.png"] = partial(write_png, figures[name])
    paths = {name: free_name(folder, f"{Path(name).stem}{version}{Path(name).suffix}") for name in writers}
    for name, write in writers.items():
        write_to(paths[name], write)
    return paths


def _write_json(report: Report, path: Path) -> None:
    content = {
        "stage": report.stage,
        "samples": report.model.total,
        "class_names": list(report.model.class_names),
        "matrix_rows": "target",
        "matrix_columns": "predicted",
        "base": None if report.base is None else report.base.as_dict(),
        "model": report.model.as_dict(),
        "changed": None if report.pairs is None else _pairs(report.pairs),
    }
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def _pairs(pairs: Pairs) -> dict[str, float | None]:
    return {"fixed": pairs.fixed, "broke": pairs.broke, "mcnemar_p": pairs.p}


def _write_csv(report: Report, path: Path) -> None:
    columns = {"": report.model} if report.base is None else {"_before": report.base, "_after": report.model}
    header = ["class", "support", *(f"{q}{when}" for q in _QUANTITIES for when in columns)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        per_class = [confusion.as_dict()["classes"] for confusion in columns.values()]
        for index, name in enumerate(report.model.class_names):
            values = [entries[index][q] for q in _QUANTITIES for entries in per_class]
            writer.writerow([name, report.model.support[index], *("" if v is None else v for v in values)])


def refuse_to_overwrite(path: Path) -> None:
    """Raise a `FileExistsError` if the file exists."""
    if path.exists():
        raise FileExistsError(f"{path} exists: it is not overwritten. Choose another name, or remove it.")


def free_path(path: Path) -> Path:
    """Return `path`, or if it exists the first unused one of `<stem>-v1`, `<stem>-v2`, ..., as in Lightning."""
    return Path(free_name(path.parent, path.name))


def free_name(folder: str | Path, name: str) -> str:
    """Return the path of `name` in `folder`, or if it exists the first unused one of `<stem>-v1`, ....

    Args:
        folder: A local folder, or a URL that fsspec supports, such as `s3://…`.
        name: Name of a file or a folder.
    """
    root, plain, version = str(folder), Path(name), 0
    path = _joined(root, name)
    while _exists(path):
        version += 1
        path = _joined(root, f"{plain.stem}-v{version}{plain.suffix}")
    return path


def _joined(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if "://" in folder else str(Path(folder) / name)


def _exists(path: str) -> bool:
    if "://" not in path:
        return Path(path).exists()
    filesystem, remote = fsspec.core.url_to_fs(path)
    return bool(filesystem.exists(remote))


def write_to(path: str, write: Callable[[Path], object]) -> None:
    """Write a file or a folder to a local path or a URL.

    Args:
        path: A local path, whose folder is created if necessary, or a URL that fsspec supports.
        write: A function that writes to a local path.
    """
    if "://" not in path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write(Path(path))
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / path.rpartition("/")[2]
        write(local)
        filesystem, remote = fsspec.core.url_to_fs(path)
        filesystem.makedirs(remote.rpartition("/")[0], exist_ok=True)
        filesystem.put(str(local), remote, recursive=local.is_dir())
