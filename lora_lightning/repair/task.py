"""Defines what a repair goes over: a model, its data, and the recipes of training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from lightning.pytorch import LightningDataModule

from lora_lightning.callbacks import LoRAFinetuning
from lora_lightning.models import Classifier

if TYPE_CHECKING:
    from lora_lightning.repair.training import Runs

Way = Literal["adapters", "full network", "last layer"]


class Task(Protocol):
    """Makes the model and the data of a repair. Each call returns a new object.

    Attributes:
        names: The names of all classes.
        noun: What a class is called: a digit, a class.
        description: Where the data come from.
        recipe: What training a base means, to be printed.
        steps: Training steps of the adapters, unless others are asked for.
        share: Share of the focus in a batch, likewise.
        log_every_n_steps: How often training is logged.
        options: Words of the command line that `test` takes to make the same model and data.
    """

    names: tuple[str, ...]
    noun: str
    description: str
    recipe: str
    steps: int
    share: float
    log_every_n_steps: int
    options: list[str]

    def model(self, way: Way = "adapters") -> Classifier:
        """Return an untrained model, with the optimizer for this way of training it."""

    def evaluated(self) -> LightningDataModule:
        """Return the data that a base is trained on and that models are evaluated on."""

    def mixed(self, focus: tuple[int, ...] | None, share: float) -> LightningDataModule:
        """Return the data that a repair trains on, set up: these classes have this share of each batch."""

    def adapters(self, rank: int, base: Path) -> LoRAFinetuning:
        """Return the callback that attaches adapters of this rank to this base."""

    def train_base(self, runs: Runs) -> Path:
        """Train a base and return its checkpoint."""

    def plain_base(self, checkpoint: Path, folder: Path) -> Path:
        """Return a checkpoint without adapters: this one, or one in `folder` with those of this one folded in."""
