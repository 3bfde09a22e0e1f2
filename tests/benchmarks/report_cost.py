"""What `ConfusionReport` costs a training step: the notebook's protocol with it and without it, in turns."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from rich.table import Table

from lora_lightning import Classifier, ConfusionReport, LoRAFinetuning, MNISTDataModule, RichBoyNet

ROUNDS = 15


class _Epoch(Callback):
    """Takes the time of a training epoch."""

    seconds = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End."""
        self.seconds = time.perf_counter() - self._began


def _milliseconds(*callbacks: Callback) -> float:
    """One epoch of 400 steps of 10 digits each; milliseconds of a step, and whatever the callbacks do in the epoch."""
    seed_everything(0, verbose=False)
    watch = _Epoch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            log_every_n_steps=10,
            logger=TensorBoardLogger(Path(folder), "logs"),
            callbacks=[LoRAFinetuning(rank=1), *callbacks, watch],  # the last one sees the end of the others' hooks
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(Classifier(RichBoyNet()), MNISTDataModule(source="sample", batch_size=10, val_fraction=0))
    return 1000 * watch.seconds / trainer.global_step


def run() -> tuple[Table, Any]:
    """Measure, and return the table and its numbers."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    _milliseconds(ConfusionReport())  # warm up
    pairs = []
    for number in range(ROUNDS):
        if number % 2:
            with_report, without = _milliseconds(ConfusionReport()), _milliseconds()
        else:
            without, with_report = _milliseconds(), _milliseconds(ConfusionReport())
        pairs.append((with_report, without))
    ratios = [a / b for a, b in pairs]
    table = Table("", "ms a step, median", title="A training epoch of the notebook's protocol, logged every 10 steps")
    table.add_row("with ConfusionReport", f"{statistics.median(a for a, _ in pairs):.3f}")
    table.add_row("without", f"{statistics.median(b for _, b in pairs):.3f}")
    quartiles = statistics.quantiles(ratios, n=4)
    table.add_row("ratio within a turn", f"{quartiles[1]:.3f} ({quartiles[0]:.3f} to {quartiles[2]:.3f})")
    return table, {"with": [a for a, _ in pairs], "without": [b for _, b in pairs], "ratio": quartiles}
