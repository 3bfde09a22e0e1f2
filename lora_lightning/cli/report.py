"""Writes the report of a run, or one report that compares several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.markup import escape

from lora_lightning.report import write_page
from lora_lightning.report.files import free_path
from lora_lightning.report.page import REPORTS, page_of
from lora_lightning.report.terminal import show


def report(words: list[str]) -> int:
    """Write the report of the given runs, and print its path.

    Args:
        words: Log folders, and `--output` with the file to write.

    Returns:
        The exit code.

    Raises:
        FileNotFoundError: If a folder is missing or contains no run.
        FileExistsError: If the file to write already exists.
    """
    parser = argparse.ArgumentParser(
        "lora-lightning report",
        description="Regenerate the report of a run, or write one report that compares several runs.",
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="LOGDIR", help="the folder of a run, or a folder with runs"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="the file to write (default: report.html in the folder of the run, or compare.html in the first folder)",
    )
    options = parser.parse_args(words)
    runs = [newest_run(folder) for folder in options.folders]
    path = options.output or (page_of(runs[0]) if len(runs) == 1 else free_path(runs[0] / "compare.html"))
    if options.output is not None and path.exists():
        raise FileExistsError(f"{path} exists: it is not overwritten. Choose another name with --output.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(runs, path)
    show(f"report     {escape(str(path))}", soft_wrap=True, highlight=False)
    return 0


def newest_run(folder: Path) -> Path:
    """Return the folder if it contains a report, else that of the newest report below, or else of the newest metrics.

    Raises:
        FileNotFoundError: If there is no run.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; expected a log folder, as fit and test write it.")
    for pattern in (*REPORTS, "metrics.csv"):
        if next(folder.glob(pattern), None) is not None:
            return folder
        found = sorted(folder.rglob(pattern), key=lambda path: (path.stat().st_mtime_ns, path))
        if found:
            return found[-1].parent
    raise FileNotFoundError(
        f"{folder} contains no run: expected confusion.json, which ConfusionReport writes in test, or metrics.csv of a "
        "fit."
    )
