"""The seed protocol, pretrain + test + adapt + test: the plain script against this project's `configs/notebook`.

Each contender runs in a process of its own (denormal numbers are a setting of the process), in turns. Seconds are
counted inside the process, from the first line of work to the last, so that imports are left out on both sides.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table

ROOT = Path(__file__).parents[2]
ROUNDS = 2
PARTS = ("pretrain", "test base", "adapt", "test base and adapted")
CONTENDERS = ("plain script", "plain script, denormals flushed", "this project")


class Stopwatch(Callback):
    """Seconds of the pass over the test data: loading, both models, counting; without drawing and writing."""

    seconds = 0.0

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the watch."""
        self._began = time.perf_counter()

    def on_test_batch_end(self, *args: Any) -> None:
        """Stops it, for now."""
        Stopwatch.seconds = time.perf_counter() - self._began


def project(data_dir: Path) -> dict[str, float]:
    """Runs the four commands by the command line's own function; seconds of each."""
    from lora_lightning.cli.main import main

    commands = (
        ("fit", "pretrain", []),
        ("test", "pretrain", ["--ckpt_path", "logs/notebook_pretrain"]),
        ("fit", "digit9", []),
        ("test", "digit9", ["--ckpt_path", "logs/notebook_digit9"]),
    )
    seconds = {}
    for part, (command, config, words) in zip(PARTS, commands, strict=True):
        path = str(ROOT / "configs" / "notebook" / f"{config}.yaml")
        watch = ["--trainer.callbacks+", "tests.benchmarks.seed_protocol.Stopwatch"] if command == "test" else []
        began = time.perf_counter()
        code = main([command, "-c", path, "--data.data_dir", str(data_dir), *watch, *words])
        seconds[part] = time.perf_counter() - began
        if code:
            sys.exit(code)
        if command == "test":
            from tests.benchmarks.seed_protocol import Stopwatch  # this module is __main__, the callback's is not

            seconds[f"{part}: the pass alone"] = Stopwatch.seconds
    return seconds


def measure(contender: str, data_dir: Path) -> dict[str, float]:
    """One contender in a process and a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.seed_protocol", contender, str(data_dir), "seconds.json"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        seconds: dict[str, float] = json.loads((Path(folder) / "seconds.json").read_text())
        seconds["whole process"] = time.perf_counter() - began
    seconds["sum"] = sum(seconds[part] for part in PARTS)
    return seconds


def run(data_dir: Path) -> tuple[Table, list[dict[str, Any]]]:
    """Lets the contenders take turns."""
    rounds = [{name: measure(name, data_dir) for name in CONTENDERS} for _ in range(ROUNDS)]
    table = Table(title=f"The seed protocol, seconds (least of {ROUNDS} rounds)", title_justify="left")
    table.add_column("part")
    for name in CONTENDERS:
        table.add_column(name, justify="right")
    for part in (*PARTS, "sum", "whole process"):
        table.add_row(part, *(f"{min(turn[name][part] for turn in rounds):.2f}" for name in CONTENDERS))
    ratios = [[turn["this project"]["sum"] / turn[name]["sum"] for turn in rounds] for name in CONTENDERS]
    table.add_row("this project x", *("; ".join(f"{ratio:.2f}" for ratio in column) for column in ratios))
    for part in ("test base", "test base and adapted"):
        alone = min(turn["this project"][f"{part}: the pass alone"] for turn in rounds)
        table.add_row(f"{part}: the pass alone", "", "", f"{alone:.2f}")
    return table, [dict(turn) for turn in rounds]


if __name__ == "__main__":
    contender, data_dir, output = sys.argv[1:]
    if contender == "this project":
        measured = project(Path(data_dir))
    else:
        from tests.benchmarks import seed_script

        torch.set_flush_denormal(contender != "plain script")
        measured = seed_script.run(Path(data_dir))
    Path(output).write_text(json.dumps(measured))
