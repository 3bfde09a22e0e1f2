"""Defines the repair of an MLP on MNIST."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from lora_lightning.callbacks import LoRAFinetuning
from lora_lightning.data import MNISTDataModule
from lora_lightning.data.mnist_files import Source
from lora_lightning.models import Classifier, OneCycle, RichBoyNet
from lora_lightning.repair.task import Method, Recipe

EXAMPLE = "configs/adapt.yaml"
"""The configuration with the same model and data."""
_PEAK_RATES: dict[Method, float] = {"adapters": 3e-3, "full network": 1e-3, "last layer": 3e-3}
_PRETRAINING_RATE = 3e-3
_PRETRAIN_BATCH_SIZE = 128
_ADAPT_BATCH_SIZE = 100
# The sample has few digits, so it needs more epochs, fewer steps, and a larger share for validation.
_EPOCHS: dict[Source, int] = {"full": 1, "sample": 4}
_STEPS: dict[Source, int] = {"full": 1500, "sample": 500}
_SHARES: dict[Source, float] = {"full": 0.15, "sample": 0.2}
_VAL_FRACTIONS: dict[Source, float] = {"full": 0.1, "sample": 1 / 3}


class Digits:
    """Describes the over-sized MLP, MNIST or the embedded sample, and the recipe of `configs/pretrain.yaml`.

    This is a `Task`.

    Args:
        data_dir: Folder of the full MNIST.
        source: "full", "sample", or "auto".
    """

    names = MNISTDataModule.class_names
    noun = "digit"
    log_every_n_steps = 10

    def __init__(self, data_dir: Path, source: Source) -> None:
        found = MNISTDataModule(data_dir, source)
        found.prepare_data()
        found.setup("fit")
        self.data_dir, self.source, self.description = data_dir, found.source, found.description()
        self.steps, self.share = _STEPS[self.source], _SHARES[self.source]
        places = {"--data.source": self.source, "--data.data_dir": str(data_dir)}
        self.options = ["--config", EXAMPLE, *(word for pair in places.items() for word in pair)]

    def model(self, method: Method = "adapters") -> Classifier:
        """Return an untrained MLP with Adam and the learning rate for this method."""
        return self._model(_PEAK_RATES[method])

    def evaluated(self) -> MNISTDataModule:
        """Return all digits in batches of 128."""
        fraction = _VAL_FRACTIONS[self.source]
        return MNISTDataModule(self.data_dir, self.source, val_fraction=fraction, batch_size=_PRETRAIN_BATCH_SIZE)

    def mixed(self, focus: tuple[int, ...] | None, share: float) -> MNISTDataModule:
        """Return the data with augmented batches of 100 in which these digits have this share."""
        data = MNISTDataModule(
            self.data_dir,
            self.source,
            focus=None if focus is None else list(focus),
            focus_fraction=share,
            augment=True,
            val_fraction=_VAL_FRACTIONS[self.source],
            batch_size=_ADAPT_BATCH_SIZE,
        )
        data.prepare_data()
        data.setup("fit")
        return data

    def adapters(self, rank: int, base: Path) -> LoRAFinetuning:
        """Return adapters for all layers."""
        return LoRAFinetuning(rank=rank, base_checkpoint=base)

    def recipe(self) -> Recipe:
        """Return the training of the MLP on all digits."""
        epochs = _EPOCHS[self.source]
        how_long = "one epoch" if epochs == 1 else f"{epochs} epochs"
        description = f"training the over-sized MLP on all ten digits for {how_long}"
        return Recipe(description, self._model(_PRETRAINING_RATE), self.evaluated(), max_epochs=epochs)

    def plain_base(self, checkpoint: Path, folder: Path) -> Path:
        """Return the checkpoint unchanged."""
        return checkpoint

    def _model(self, rate: float) -> Classifier:
        return Classifier(RichBoyNet(), partial(torch.optim.Adam, lr=rate, fused=True), OneCycle)
