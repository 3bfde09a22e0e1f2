"""The report on disk: `confusion.json` with everything, `confusion.csv` with one row a class; and names that are free."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import fsspec

from lora_lightning.report.confusion import Report


def write_report(report: Report, folder: str | Path) -> tuple[str, str]:
    """Write both files to `folder`, for a validation with `_val` in their names; never over existing ones.

    Args:
        report: What they hold.
        folder: Made if missing; an address like `s3://…` is one, too.

    Returns:
        Their paths.
    """
    name = "confusion" if report.stage == "test" else f"confusion_{report.stage}"
    name += report.suffix.replace("/", "_")
    paths = free_name(folder, f"{name}.json"), free_name(folder, f"{name}.csv")
    write_to(paths[0], lambda path: _write_json(report, path))
    write_to(paths[1], lambda path: _write_csv(report, path))
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
    }
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def _write_csv(report: Report, path: Path) -> None:
    columns = {"": report.model} if report.base is None else {"_before": report.base, "_after": report.model}
    header = ["class", "support", *(f"{q}{when}" for q in ("errors", "recall", "precision") for when in columns)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        per_class = [confusion.as_dict()["classes"] for confusion in columns.values()]
        for index, name in enumerate(report.model.class_names):
            values = [entries[index][q] for q in ("errors", "recall", "precision") for entries in per_class]
            writer.writerow([name, report.model.support[index], *("" if v is None else v for v in values)])


def free_path(path: Path) -> Path:
    """Return `path`, or if that exists the first of `<stem>-v1`, `<stem>-v2`, ... that does not, as Lightning numbers."""
    return Path(free_name(path.parent, path.name))


def free_name(folder: str | Path, name: str) -> str:
    """Return the path of `name` in `folder`, or if that exists of the first of `<stem>-v1`, ... that does not.

    Args:
        folder: A local one, or an address that fsspec knows, like `s3://…`.
        name: Of a file or a folder.
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
    """Write a file or a folder, wherever it is.

    Args:
        path: A local one, whose folder is made if missing, or an address that fsspec knows.
        write: Writes it to a local path.
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
