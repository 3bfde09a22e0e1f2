"""Trains what a repair compares: the base, adapters, and the usual ways without adapters."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lora_lightning.callbacks import LoRAFinetuning
from lora_lightning.data import MNISTDataModule
from lora_lightning.models import Classifier, OneCycle, RichBoyNet
from lora_lightning.repair.answers import Answers, AnswersOf
from lora_lightning.resume.checkpoints import load_base

Way = Literal["adapters", "full network", "last layer"]
_PEAK_RATES: dict[Way, float] = {"adapters": 3e-3, "full network": 1e-3, "last layer": 3e-3}
_PRETRAINING_RATE = 3e-3


@dataclass(frozen=True)
class Trained:
    """Holds a model that was trained from the base, how many of its parameters were, and how long that took.

    Args:
        model: The model.
        parameters: Number of trained parameters.
        seconds: Wall-clock time of `Trainer.fit`.
        adapters: The callback, if adapters were trained.
    """

    model: Classifier
    parameters: int
    seconds: float
    adapters: LoRAFinetuning | None


class Runs:
    """Makes the trainers of one repair: they log to `<log_dir>/repair/version_N/<part>`."""

    def __init__(self, log_dir: Path, accelerator: str) -> None:
        self.log_dir = log_dir
        self.accelerator = accelerator
        self.version = TensorBoardLogger(log_dir, name="repair").version
        self.folder = log_dir / "repair" / f"version_{self.version}"

    def trainer(self, part: str, *callbacks: Callback, max_epochs: int | None = None, max_steps: int = -1) -> Trainer:
        """Return a trainer on one device. One with a length trains, and does not validate meanwhile."""
        return Trainer(
            accelerator=self.accelerator,
            devices=1,
            logger=TensorBoardLogger(self.log_dir, name="repair", version=self.version, sub_dir=part),
            callbacks=[RichProgressBar(refresh_rate=10), *callbacks],
            max_epochs=max_epochs,
            max_steps=max_steps,
            log_every_n_steps=10,
            num_sanity_val_steps=0,
            limit_val_batches=1.0 if max_epochs is None else 0,
            enable_model_summary=False,
            enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        )

    def pretrain(self, data: MNISTDataModule, epochs: int) -> Path:
        """Train a base on all classes, by the recipe of `configs/pretrain.yaml`, and return its checkpoint."""
        model = Classifier(RichBoyNet(), partial(torch.optim.Adam, lr=_PRETRAINING_RATE, fused=True), OneCycle)
        checkpoint = ModelCheckpoint(self.folder / "base" / "checkpoints", filename="base")
        self.trainer("base", checkpoint, max_epochs=epochs).fit(model, datamodule=data)
        return Path(checkpoint.best_model_path)

    def train(
        self, part: str, base: Path, data: MNISTDataModule, way: Way, *, steps: int, seed: int, rank: int = 8
    ) -> Trained:
        """Train from the base, with the same order of samples and the same augmentation whatever the way."""
        seed_everything(seed, workers=True, verbose=False)
        optimizer = partial(torch.optim.Adam, lr=_PEAK_RATES[way], fused=True)
        model = Classifier(RichBoyNet(), optimizer, OneCycle)
        callback = None
        if way == "adapters":
            callback = LoRAFinetuning(rank=rank, base_checkpoint=base)
        else:
            load_base(model, base)
            if way == "last layer":
                model.requires_grad_(False)
                [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1].requires_grad_(True)
        epochs = -(-steps // len(data.train_dataloader()))
        trainer = self.trainer(part, *filter(None, [callback]), max_epochs=epochs, max_steps=steps)
        start = time.perf_counter()
        trainer.fit(model, datamodule=data)
        seconds = time.perf_counter() - start
        trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
        return Trained(model, trained, seconds, callback)

    def base_answers(self, base: Path, data: MNISTDataModule, split: Literal["validate", "test"]) -> Answers:
        """Return the answers of the base on disk, without adapters ever attached."""
        model = Classifier(RichBoyNet())
        load_base(model, base)
        return self.answers(model, data, split)

    def answers(self, model: Classifier, data: MNISTDataModule, split: Literal["validate", "test"]) -> Answers:
        """Return the answers of a model on one split."""
        kept = AnswersOf()
        trainer = Trainer(
            accelerator=self.accelerator,
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            callbacks=[kept],
        )
        getattr(trainer, split)(model, datamodule=data, verbose=False)
        return kept.answers()
