"""A training step in a bare PyTorch loop, in Lightning's `barebones` loop, and in `Trainer.fit`.

`Trainer.fit` has logging, progress and checkpoints.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from rich.table import Table
from torch.nn import functional as F

from lora_lightning import Classifier, ConfusionReport, LoRAConfig, LoRAFinetuning, MNISTDataModule, RichBoyNet
from lora_lightning.cli.cpu import tune_for_cpu
from lora_lightning.cli.progress_lines import ProgressLines
from lora_lightning.lora import attach

EPOCHS, ROUNDS, RANK = 3, 5, 8


class Clock(Callback):
    """Measures the time from the first batch to the end of training."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.milliseconds = 1000 * (time.perf_counter() - self.began) / trainer.global_step


def _data(batch: int) -> MNISTDataModule:
    return MNISTDataModule(source="sample", batch_size=batch)


def _module(adapted: bool) -> Classifier:
    seed_everything(0, verbose=False)
    module = Classifier(RichBoyNet())
    if adapted:
        attach(module.backbone, LoRAConfig(rank=RANK))
    return module


def bare(batch: int, adapted: bool) -> float:
    """Return the milliseconds per step of a loop in PyTorch."""
    module, data = _module(adapted), _data(batch)
    data.prepare_data()
    data.setup("fit")
    loader, optimizer = data.train_dataloader(), module.configure_optimizers()
    began, steps = time.perf_counter(), 0
    for _ in range(EPOCHS):
        for samples in loader:
            images, targets = data.on_after_batch_transfer(samples, 0)
            optimizer.zero_grad()
            F.cross_entropy(module(images), targets).backward()
            optimizer.step()
            steps += 1
    return 1000 * (time.perf_counter() - began) / steps


def barebones(batch: int, adapted: bool) -> float:
    """Return the milliseconds per step of Lightning's loop without any of its features."""
    clock = Clock()
    trainer = Trainer(barebones=True, accelerator="cpu", max_epochs=EPOCHS, limit_val_batches=0, callbacks=[clock])
    trainer.fit(_module(adapted), _data(batch))
    return clock.milliseconds


def fit(batch: int, adapted: bool) -> float:
    """Return the milliseconds per step of `fit` with the callbacks of the command line. Validation is not included."""
    clock, ours = Clock(), [LoRAFinetuning(rank=RANK), ConfusionReport()] if adapted else []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=EPOCHS,
            limit_val_batches=0,
            log_every_n_steps=10,
            logger=TensorBoardLogger(Path(folder), "logs"),
            callbacks=[*ours, ProgressLines(), ModelCheckpoint(save_last=True), clock],
            enable_model_summary=False,
        )
        trainer.fit(_module(False), _data(batch))
    return clock.milliseconds


def run() -> tuple[Table, Any]:
    """Return the medians of milliseconds per step and of their ratios, over rounds in which the loops take turns."""
    warnings.filterwarnings("ignore")
    tune_for_cpu()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    columns = ("trained", "batch", "bare, ms", "barebones", "fit", "barebones / bare", "fit / bare", "fit / barebones")
    table, results = Table(*columns, title=f"A step of RichBoyNet, rank {RANK}, {EPOCHS} epochs, {ROUNDS} rounds"), []
    for adapted in (True, False):
        for batch in (10, 64):
            turns = [[way(batch, adapted) for way in (bare, barebones, fit)] for _ in range(ROUNDS)]
            medians = [statistics.median(times) for times in zip(*turns, strict=True)]
            pairs = ((1, 0), (2, 0), (2, 1))
            ratios = [statistics.median(turn[one] / turn[other] for turn in turns) for one, other in pairs]
            name = f"adapters, rank {RANK}" if adapted else "full"
            table.add_row(name, str(batch), *(f"{each:.2f}" for each in (*medians, *ratios)))
            results.append({"trained": name, "batch": batch, "milliseconds": medians, "ratios": ratios, "turns": turns})
    return table, results
