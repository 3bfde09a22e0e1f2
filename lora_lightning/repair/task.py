"""Defines the interface `Task`: a model, its data, its adapters, and how its base is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from lightning.pytorch import LightningDataModule, Trainer

from lora_lightning.callbacks import LoRAFinetuning
from lora_lightning.models import Classifier

Method = Literal["adapters", "full network", "last layer"]
"""A method of training from the base."""


@dataclass(frozen=True)
class Recipe:
    """Describes how a base is trained. `Runs` executes it.

    Args:
        description: The recipe in words.
        model: An untrained model.
        data: The data.
        max_epochs: Number of epochs, if there is no trainer.
        trainer: A configured trainer, or `None` for one of `Runs`.
    """

    description: str
    model: Classifier
    data: LightningDataModule
    max_epochs: int | None = None
    trainer: Trainer | None = None


class Task(Protocol):
    """Describes what is repaired. Each call returns a new object.

    Attributes:
        names: The names of all classes.
        noun: Name for a class: digit or class.
        description: Description of the data.
        steps: Default number of training steps of the adapters.
        share: Default share of the focus in a batch.
        log_every_n_steps: Number of steps between logged ones.
        options: Command-line arguments with which `test` creates the same model and data.
    """

    names: tuple[str, ...]
    noun: str
    description: str
    steps: int
    share: float
    log_every_n_steps: int
    options: list[str]

    def model(self, method: Method = "adapters") -> Classifier:
        """Return an untrained model with the optimizer for this method."""

    def evaluated(self) -> LightningDataModule:
        """Return the data for evaluating models."""

    def mixed(self, focus: tuple[int, ...] | None, share: float) -> LightningDataModule:
        """Return the data for training a repair after `setup`, where these classes have this share of a batch."""

    def adapters(self, rank: int, base: Path) -> LoRAFinetuning:
        """Return the callback that attaches adapters of this rank to this base."""

    def recipe(self) -> Recipe:
        """Return how a base is trained."""

    def plain_base(self, checkpoint: Path, folder: Path) -> Path:
        """Return a checkpoint without adapters: this one, or one in `folder` with its adapters merged."""
