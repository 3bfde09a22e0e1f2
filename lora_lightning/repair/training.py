"""Trains the candidates of a repair: adapters, and baselines without adapters."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lora_lightning.callbacks import LoRAFinetuning
from lora_lightning.callbacks.loss_bar import LossBar
from lora_lightning.checkpoints import load_base
from lora_lightning.lora.freeze import freeze
from lora_lightning.models import Classifier
from lora_lightning.repair.predictions import PredictionCollector, Predictions
from lora_lightning.repair.task import Method, Recipe, Task

Split = Literal["validate", "test"]


@dataclass(frozen=True)
class Trained:
    """Holds a model that was trained from the base.

    Args:
        model: The model.
        parameters: Number of trained parameters.
        seconds: Wall-clock time of `Trainer.fit`.
        adapters: The callback if adapters were trained, else `None`.
    """

    model: Classifier
    parameters: int
    seconds: float
    adapters: LoRAFinetuning | None

    @property
    def adapted(self) -> nn.Module:
        """Return the adapted part of the model."""
        assert self.adapters is not None
        assert self.adapters.adapted is not None
        return self.adapters.adapted


class Runs:
    """Creates the trainers of a repair, which log to `<log_dir>/repair/version_N/<part>`."""

    def __init__(self, log_dir: Path, accelerator: str, log_every_n_steps: int) -> None:
        self.log_every_n_steps = log_every_n_steps
        self.log_dir = log_dir
        self.accelerator = accelerator
        self.version = TensorBoardLogger(log_dir, name="repair").version
        self.folder = log_dir / "repair" / f"version_{self.version}"

    def trainer(self, part: str, *callbacks: Callback, max_epochs: int | None = None, max_steps: int = -1) -> Trainer:
        """Return a trainer on one device. With a length, it trains with a bar and without validation."""
        bar = [] if max_epochs is None else [LossBar(refresh_rate=10)]
        return Trainer(
            accelerator=self.accelerator,
            devices=1,
            logger=TensorBoardLogger(self.log_dir, name="repair", version=self.version, sub_dir=part),
            callbacks=[*bar, *callbacks],
            enable_progress_bar=bool(bar),
            max_epochs=max_epochs,
            max_steps=max_steps,
            log_every_n_steps=self.log_every_n_steps,
            num_sanity_val_steps=0,
            limit_val_batches=1.0 if max_epochs is None else 0,
            enable_model_summary=False,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        )

    def train_base(self, recipe: Recipe) -> Path:
        """Train a base and return its best checkpoint."""
        trainer = recipe.trainer
        if trainer is None:
            checkpoint = ModelCheckpoint(self.folder / "base" / "checkpoints", filename="base")
            trainer = self.trainer("base", checkpoint, max_epochs=recipe.max_epochs)
        trainer.fit(recipe.model, datamodule=recipe.data)
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if not best:
            raise ValueError(
                "The configured fit has not written a checkpoint. Do not disable trainer.enable_checkpointing."
            )
        return Path(best)

    def train(
        self, part: str, task: Task, base: Path, data: LightningDataModule, method: Method, steps: int, rank: int
    ) -> Trained:
        """Train from the base, with the same order of samples and the same augmentation for all methods.

        Norm layers keep their statistics in all methods, as they do with adapters.
        """
        model = task.model(method)
        callback = None
        if method == "adapters":
            callback = task.adapters(rank, base)
        else:
            load_base(model, base)
            trained = [value for value in model.parameters() if value.requires_grad]
            if method == "last layer":
                trained = list([layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1].parameters())
            freeze(model)
            for value in trained:
                value.requires_grad_(True)
        epochs = -(-steps // len(data.train_dataloader()))
        trainer = self.trainer(part, *filter(None, [callback]), max_epochs=epochs, max_steps=steps)
        start = time.perf_counter()
        trainer.fit(model, datamodule=data)
        seconds = time.perf_counter() - start
        count = sum(value.numel() for value in model.parameters() if value.requires_grad)
        return Trained(model, count, seconds, callback)

    def predict_base(self, task: Task, base: Path, data: LightningDataModule, split: Split) -> Predictions:
        """Return the predictions of the base on disk, without attaching adapters.

        It is frozen as below adapters, since PyTorch selects the kernels of some products by whether a weight requires
        gradients.
        """
        model = task.model()
        load_base(model, base)
        model.requires_grad_(False)
        return self.predict(model, data, split)

    def predict(self, model: Classifier, data: LightningDataModule, split: Split) -> Predictions:
        """Return the predictions of a model on one split."""
        collector = PredictionCollector()
        trainer = Trainer(
            accelerator=self.accelerator,
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            callbacks=[collector],
        )
        evaluate = trainer.validate if split == "validate" else trainer.test
        evaluate(model, datamodule=data, verbose=False)
        return collector.predictions()
