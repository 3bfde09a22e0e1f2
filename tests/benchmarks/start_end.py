"""What a command spends its seconds on, from the start of Python to its last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

ROOT = Path(__file__).parents[2]
ROUNDS = 5
DATA = ("--data.source", "sample")
COMMANDS = {
    "fit of 100 steps": ("fit", "--config", "configs/adapt.yaml", "--trainer.max_steps", "100", *DATA),
    "test": ("test", "--config", "configs/adapt.yaml", "--ckpt_path", "logs/adapt", *DATA),
}
BASE = ("fit", "--config", "configs/pretrain.yaml", "--trainer.max_steps", "100", *DATA)


def run() -> tuple[Table, Any]:
    """Return the median seconds of each part, over rounds of both commands on the embedded sample."""
    found: dict[str, list[dict[str, float]]] = {command: [] for command in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "configs").symlink_to(ROOT / "configs")
        _seconds_of(BASE, folder)
        for _ in range(ROUNDS):
            for command, words in COMMANDS.items():
                found[command].append(_seconds_of(words, folder))
    medians = {
        command: {part: median(each[part] for each in rounds) for part in rounds[0]}
        for command, rounds in found.items()
    }
    table = Table(title=f"Seconds of a command on the embedded sample; medians of {ROUNDS}", title_justify="left")
    table.add_column("part")
    for command in COMMANDS:
        table.add_column(command, justify="right")
    for part in next(iter(medians.values())):
        table.add_row(part, *(f"{medians[command][part]:.2f}" for command in COMMANDS))
    table.add_section()
    table.add_row("sum", *(f"{sum(medians[command].values()):.2f}" for command in COMMANDS))
    return table, {"rounds": found}


def _seconds_of(words: tuple[str, ...], folder: str) -> dict[str, float]:
    target = Path(folder) / "seconds.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.benchmarks.timed_command", str(target), str(time.time()), *words]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return dict(json.loads(target.read_text()))
