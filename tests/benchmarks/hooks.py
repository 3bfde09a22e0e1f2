"""What a training step of `Trainer.fit` consists of, hook by hook, under Lightning's profiler."""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import SimpleProfiler
from rich.table import Table

from lora_lightning import Classifier, ConfusionReport, LoRAFinetuning, MNISTDataModule, RichBoyNet
from lora_lightning.cli.progress_lines import ProgressLines

EPOCHS, SHOWN = 3, 14


def run() -> tuple[Table, Any]:
    """Return the milliseconds a step of what takes most, and of each of our callbacks.

    The training has three epochs of 400 steps of 10 digits.
    """
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    seed_everything(0, verbose=False)
    profiler = SimpleProfiler()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=EPOCHS,
            log_every_n_steps=10,
            logger=TensorBoardLogger(Path(folder), "logs"),
            callbacks=[LoRAFinetuning(rank=1), ConfusionReport(), ProgressLines(), ModelCheckpoint(save_last=True)],
            enable_model_summary=False,
            profiler=profiler,
        )
        trainer.fit(Classifier(RichBoyNet()), MNISTDataModule(source="sample", batch_size=10))
    steps = trainer.global_step
    spent = {action: 1000 * sum(times) / steps for action, times in profiler.recorded_durations.items()}
    calls = {action: len(times) / steps for action, times in profiler.recorded_durations.items()}
    of_ours = {key: value for key, value in spent.items() if key.startswith("[Callback]")}
    table = Table(title=f"Milliseconds a step, of {steps:,} steps; rank 1, batch 10")
    for heading in ("action", "ms a step", "calls a step"):
        table.add_column(heading)
    for action in sorted(spent, key=lambda key: -spent[key])[:SHOWN]:
        table.add_row(action, f"{spent[action]:.3f}", f"{calls[action]:.2f}")
    table.add_section()
    for action in sorted(of_ours, key=lambda key: -of_ours[key])[:SHOWN]:
        table.add_row(action, f"{spent[action]:.3f}", f"{calls[action]:.2f}")
    return table, {"steps": steps, "milliseconds": spent, "calls": calls}
