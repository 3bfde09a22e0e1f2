"""Kills trainings repeatedly at random places, and compares: `python -m tests.benchmarks.kills --kills 40 --seed 0`.

There is one training per setting. It is a process of its own (`killed_run`), which SIGKILL ends during a batch, a save
or a validation, and which is then resumed from the newest checkpoint. In the end, its weights, optimizer, schedulers,
metrics, adapter folder, best checkpoint and random numbers are compared with those of a training that was not
disturbed. The kills are spread over all settings, or over those named with `--settings`.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich import get_console
from rich.table import Table

from lora_lightning.checkpoints import newest_checkpoint
from tests.benchmarks.killed_run import BATCHES, EPOCHS, RESULT, SETTINGS
from tests.helpers import same
from tests.processes import ROOT, Process

LONGEST_DELAY = 0.02
"""Seconds from the start of a batch to a kill, at most: some batches, a save or a validation."""


def start(name: str, folder: Path, checkpoint: Path | None = None) -> Process:
    """Start a training."""
    words = ["-m", "tests.benchmarks.killed_run", name, str(folder), *([] if checkpoint is None else [str(checkpoint)])]
    return Process(*words, folder=ROOT, devices=SETTINGS[name].devices)


def finish(process: Process, folder: Path) -> dict[str, Any]:
    """Let a training end, and return its result."""
    output = process.finish()
    assert process.code == 0, output
    result: dict[str, Any] = torch.load(folder / RESULT, weights_only=False)
    return result


def kill_at(process: Process, batch: int, later: float) -> int:
    """Kill a training and its processes a while after a batch has started, and return the last batch that started."""
    while f"batch {batch}\n" not in process.output and not process.has_ended:
        time.sleep(0.002)
    time.sleep(later)
    assert not process.has_ended, process.output
    process.send(signal.SIGKILL)
    output = process.finish()
    assert process.code == -signal.SIGKILL, "it had ended before it was killed"
    begun = [line for line in output.splitlines() if line.startswith("batch ")]
    return int(begun[-1].split()[1])


def places(count: int, choose: random.Random) -> list[int]:
    """Return the batches in which to kill a training, after its first checkpoint and before its last batches."""
    return sorted(choose.sample(range(BATCHES + 1, BATCHES * EPOCHS - 8, 2), count))


def killed_training(name: str, batches: list[int], choose: random.Random, folder: Path) -> list[str]:
    """Kill a training in each of these batches, and let it end.

    Returns:
        What differs from a training that was not disturbed. It is empty if all is equal.
    """
    whole, killed = folder / "whole", folder / "killed"
    expected = finish(start(name, whole), whole)
    newest: Path | None = None
    for number, batch in enumerate([*batches, None]):
        place = killed / (str(number) if SETTINGS[name].new_folder else "all")
        process = start(name, place, newest)
        if batch is None:
            found = finish(process, place)
            break
        last = kill_at(process, batch, choose.uniform(0, LONGEST_DELAY))
        newest = newest_checkpoint(killed)
        print(
            f"{name}: killed in batch {last}; goes on from {newest.resolve().relative_to(killed.resolve())}", flush=True
        )
    return [key for key, value in expected.items() if not same(value, found[key])]


def main() -> None:
    """Kill, resume, and print a line per kill and a table; exit with 1 unless all are equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    options = parser.parse_args()
    settings: list[str] = options.settings
    table = Table("setting", "killed in batch", "different", title=f"{options.kills} kills, seed {options.seed}")
    equal = 0
    for number, name in enumerate(settings):
        choose = random.Random(f"{name} {options.seed}")
        batches = places(options.kills // len(settings) + (number < options.kills % len(settings)), choose)
        with tempfile.TemporaryDirectory() as folder:
            different = killed_training(name, batches, choose, Path(folder))
        equal += not different
        print(f"{name}: {f'different: {different}' if different else 'bitwise equal'}", flush=True)
        table.add_row(name, ", ".join(map(str, batches)), ", ".join(different) or "nothing")
    get_console().print(table)
    print(f"{equal} of {len(settings)} trainings are bitwise equal to one that was not disturbed")
    sys.exit(equal < len(settings))


if __name__ == "__main__":
    main()
