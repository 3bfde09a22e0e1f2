"""Runs one command of `lora-lightning` and writes the seconds that each of its parts took, as JSON.

python -m tests.benchmarks.timed_command <file to write> <time of the start> fit --config configs/adapt.yaml ...
"""

import time

TIMES = {"Python": time.time()}

import json
import sys
from pathlib import Path
from typing import Any

import torch  # noqa: F401

TIMES["import of PyTorch"] = time.time()
from lightning.pytorch.cli import LightningCLI  # noqa: F401
from lightning.pytorch.profilers import SimpleProfiler

TIMES["import of Lightning"] = time.time()
from lora_lightning.cli.closing import show_closing
from lora_lightning.cli.cpu import tune_for_cpu
from lora_lightning.cli.main import LoRALightningCLI

TIMES["import of this package"] = time.time()

RUN = "the run"
PARTS = {
    "data": ("[LightningDataModule]",),
    "adapters: base, attach, fingerprint": ("LoRAFinetuning.setup",),
    "base hashed, before and after; adapter folder": ("LoRAFinetuning.on_fit_start", "LoRAFinetuning.on_fit_end"),
    "training steps": ("run_training_batch",),
    "checkpoints": ("save_checkpoint",),
    "report: files, figures, page": ("ConfusionReport.on_fit_end", "ConfusionReport.on_test_epoch_end"),
}


class TimedCLI(LoRALightningCLI):
    """The command line, which notes the time in hooks that Lightning has for its users."""

    profiler: SimpleProfiler

    def before_instantiate_classes(self) -> None:
        """Note the end of parsing."""
        super().before_instantiate_classes()
        TIMES["command line and YAML"] = time.time()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Give the trainer a profiler."""
        self.profiler = SimpleProfiler()
        return super().instantiate_trainer(**{"profiler": self.profiler} | kwargs)

    def after_instantiate_classes(self) -> None:
        """Note the end of making objects."""
        super().after_instantiate_classes()
        TIMES["trainer, model and data module made"] = time.time()


def main() -> None:
    """Run the command and write what took how long."""
    target, began, *words = sys.argv[1:]
    tune_for_cpu()
    cli = TimedCLI(words)
    TIMES[RUN] = time.time()
    show_closing(cli.trainer, str(cli.subcommand), words)
    TIMES["closing lines"] = time.time()
    ends = [float(began), *TIMES.values()]
    seconds = {part: end - start for part, start, end in zip(TIMES, ends[:-1], ends[1:], strict=True)}
    whole = seconds.pop(RUN)
    inside = {
        part: sum(
            sum(spent)
            for action, spent in cli.profiler.recorded_durations.items()
            if any(map(action.__contains__, names))
        )
        for part, names in PARTS.items()
    }
    seconds |= inside | {"the rest of the run": whole - sum(inside.values())}
    Path(target).write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()
