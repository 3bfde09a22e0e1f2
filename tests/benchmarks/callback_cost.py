"""What `LoRAFinetuning` adds to a training step, beside the same adapters attached by hand in plain Lightning."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.table import Table

from lora_lightning import Classifier, LoRAConfig, LoRAFinetuning, MNISTDataModule, RichBoyNet
from lora_lightning.lora import attach

BATCH, RANK, EPOCHS, TURNS = 10, 8, 1, 10


class Clock(Callback):
    """Measures the processor time from the first batch to the end of training."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = time.process_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.milliseconds = 1000 * (time.process_time() - self.began) / trainer.global_step


def step(with_callback: bool) -> tuple[float, list[str]]:
    """Return the milliseconds of a step in `fit`, and the names of the trained parameters."""
    seed_everything(0, verbose=False)
    module, clock = Classifier(RichBoyNet()), Clock()
    if not with_callback:
        attach(module.backbone, LoRAConfig(rank=RANK))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*([LoRAFinetuning(rank=RANK)] if with_callback else []), clock],
    )
    trainer.fit(module, MNISTDataModule(source="sample", batch_size=BATCH))
    return clock.milliseconds, [name for name, value in module.named_parameters() if value.requires_grad]


def run() -> tuple[Table, Any]:
    """Return the medians of both, and the median of the ratios within a turn. Both take turns in one process."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    assert step(True)[1] == step(False)[1]  # which also warms up
    turns: list[dict[bool, float]] = []
    for turn in range(TURNS):
        order = (True, False) if turn % 2 else (False, True)
        turns.append({way: step(way)[0] for way in order})
    by_hand, with_callback = (statistics.median(turn[way] for turn in turns) for way in (False, True))
    ratios = [turn[True] / turn[False] for turn in turns]
    table = Table(title=f"A step of RichBoyNet in fit, batch {BATCH}, rank {RANK}; medians of {TURNS} turns")
    for heading in ("by hand, ms", "LoRAFinetuning, ms", "ratio", "lowest", "highest"):
        table.add_column(heading)
    numbers = (by_hand, with_callback, statistics.median(ratios), min(ratios), max(ratios))
    table.add_row(*(f"{number:.3f}" for number in numbers))
    return table, {"turns": [{"by hand": turn[False], "LoRAFinetuning": turn[True]} for turn in turns]}
