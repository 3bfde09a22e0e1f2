"""Writes reports to disk, and finds unused file names."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from lora_lightning.evaluation import Compared, Confusion, Pairs, Report, ValueChanges, Values, or_none
from lora_lightning.report.counts import write_counts
from lora_lightning.report.figure import report_figures, write_png
from lora_lightning.report.samples import write_samples

if TYPE_CHECKING:  # matplotlib takes half a second to import
    from matplotlib.figure import Figure

_UNCHANGED = ("class", "label", "targets", "support", "samples")
"""Columns that are the same for the base."""
_IMAGES = ("confusion", "confusion_normalized", "difference", "mistakes")


def write_report(report: Report, folder: str | Path, figures: dict[str, Figure] | None = None) -> dict[str, str]:
    """Write a report to `folder` without overwriting files. The names contain `_val` for a validation.

    Args:
        report: The report.
        folder: A folder, which is created if necessary, or a URL such as `s3://…`.
        figures: The result of `report_figures`, if available.

    Returns:
        The paths of the files by their plain names: `confusion.json` with all numbers, `confusion.csv` with one row per
        class, for more than 100 classes `counts.csv` with one row per pair of classes that occurs, and the images of
        `report_figures`: `confusion.png`, for unequal classes `confusion_normalized.png`, and with a base
        `difference.png`. If samples changed, also `samples.json` and `mistakes.png`. For tasks without classes, only
        `comparison.json` and `comparison.csv`.
    """
    kind = "confusion" if isinstance(report.adapted, Confusion) else "comparison"
    ending = "" if report.stage == "test" else f"_{report.stage}"
    ending += report.suffix.replace("/", "_")
    version = Path(free_name(folder, f"{kind}{ending}.json")).stem.removeprefix(kind)
    writers: dict[str, Callable[[Path], object]] = {
        f"{kind}.json": partial(_write_json, report),
        f"{kind}.csv": partial(_write_csv, report),
    }
    if isinstance(report.adapted, Confusion) and report.adapted.has_many_classes:
        writers["counts.csv"] = partial(write_counts, report)
    samples = [] if report.pairs is None else report.pairs.samples
    if samples:
        writers["samples.json"] = partial(write_samples, samples)
    if figures is None:
        figures = report_figures(report) if isinstance(report.adapted, Confusion) else {}
    for name in filter(figures.__contains__, _IMAGES):
        writers[f"{name}.png"] = partial(write_png, figures[name])
    paths = {name: free_name(folder, f"{Path(name).stem}{version}{Path(name).suffix}") for name in writers}
    for name, write in writers.items():
        write_to(paths[name], write)
    return paths


def _write_json(report: Report, path: Path) -> None:
    path.write_text(json.dumps(content_of(report), indent=1, allow_nan=False) + "\n")


def content_of(report: Report) -> dict[str, Any]:
    """Return the content of `confusion.json` or `comparison.json`."""
    adapted, test = report.adapted, report.test
    content: dict[str, Any] = {
        "stage": report.stage,
        "task": report.task,
        "read_as": report.read_as,
        "samples": adapted.total,
        "against": report.against,
        "base": None if report.base is None else report.base.as_dict(),
        "model": adapted.as_dict(),
        "changed": None if report.pairs is None else _pairs(report.pairs),
        "p_value": report.p_value,
        "bootstrap": None if test is None else {name: or_none(value) for name, value in asdict(test).items()},
        "fixed": report.fixed,
        "broken": report.broken,
        "improved": report.improved,
        "worsened": report.worsened,
        "metrics": {name: _metric(both) for name, both in report.metrics.items()},
    }
    if isinstance(adapted, Values) and isinstance(report.base, Values):
        content["errors"] = asdict(ValueChanges.of(report.base, adapted))
    if isinstance(adapted, Confusion):
        content |= {"class_names": adapted.class_names, "matrix_rows": "target", "matrix_columns": "predicted"}
    return content


def _metric(both: Compared) -> dict[str, float | None]:
    numbers = {"base": both.base, "adapted": both.adapted, "difference": both.difference}
    return {name: None if value is None else or_none(value) for name, value in numbers.items()}


def _pairs(pairs: Pairs) -> dict[str, float | None]:
    return {"fixed": pairs.fixed, "broke": pairs.broke, "mcnemar_p": pairs.p}


def _write_csv(report: Report, path: Path) -> None:
    tables = {"": report.adapted.table()}
    if report.base is not None:
        tables = {"_before": report.base.table(), "_after": report.adapted.table()}
    columns: dict[str, list[Any]] = {}
    for name in report.adapted.table():
        if name in _UNCHANGED:
            columns[name] = report.adapted.table()[name]
        else:
            columns |= {f"{name}{when}": table[name] for when, table in tables.items()}
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            writer.writerow(["" if isinstance(value, float) and isnan(value) else value for value in row])


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
