"""Defines the interface `Task`: a model, its data, and recipes for training."""

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
    """Creates the model and the data of a repair. Each call returns a new object.

    Attributes:
        names: The names of all classes.
        noun: Name for a class: digit or class.
        description: Description of the data.
        recipe: Description of the training of a base.
        steps: Default number of training steps of the adapters.
        share: Default share of the focus in a batch.
        log_every_n_steps: Number of steps between logged ones.
        options: Command-line arguments with which `test` creates the same model and data.
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
        """Return an untrained model with the optimizer for this kind of training."""

    def evaluated(self) -> LightningDataModule:
        """Return the data for training a base and evaluating models."""

    def mixed(self, focus: tuple[int, ...] | None, share: float) -> LightningDataModule:
        """Return the data for training a repair after `setup`, where these classes have this share of each batch."""

    def adapters(self, rank: int, base: Path) -> LoRAFinetuning:
        """Return the callback that attaches adapters of this rank to this base."""

    def train_base(self, runs: Runs) -> Path:
        """Train a base and return its checkpoint."""

    def plain_base(self, checkpoint: Path, folder: Path) -> Path:
        """Return a checkpoint without adapters: this one, or one in `folder` with its adapters merged."""
