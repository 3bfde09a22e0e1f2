"""The report on disk: `confusion.json` with everything, `confusion.csv` with one row a class."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from lora_lightning.report.confusion import Report


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Writes both files to `folder`, for a validation with `_val` in their names; never over existing ones.

    Returns:
        Their paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = "confusion" if report.stage == "test" else f"confusion_{report.stage}"
    json_path, csv_path = free_path(folder / f"{name}.json"), free_path(folder / f"{name}.csv")
    content = {
        "stage": report.stage,
        "samples": report.model.total,
        "class_names": list(report.model.class_names),
        "matrix_rows": "target",
        "matrix_columns": "predicted",
        "base": None if report.base is None else report.base.as_dict(),
        "model": report.model.as_dict(),
    }
    json_path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")

    columns = {"": report.model} if report.base is None else {"_before": report.base, "_after": report.model}
    header = ["class", "support", *(f"{q}{when}" for q in ("errors", "recall", "precision") for when in columns)]
    with csv_path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        per_class = [confusion.as_dict()["classes"] for confusion in columns.values()]
        for index, name in enumerate(report.model.class_names):
            values = [entries[index][q] for q in ("errors", "recall", "precision") for entries in per_class]
            writer.writerow([name, report.model.support[index], *("" if v is None else v for v in values)])
    return json_path, csv_path


def free_path(path: Path) -> Path:
    """`path`, or if that exists the first of `<stem>-v1`, `<stem>-v2`, ... that does not, as Lightning numbers."""
    candidate, version = path, 0
    while candidate.exists():
        version += 1
        candidate = path.with_name(f"{path.stem}-v{version}{path.suffix}")
    return candidate
