"""Defines the repair of a model and data from a configuration."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeGuard

from lightning.pytorch import LightningDataModule
from torch.nn import Parameter
from torch.optim import Optimizer

from lora_lightning.backbone_facts import backbone_facts, set_backbone_facts
from lora_lightning.callbacks import LoRAFinetuning
from lora_lightning.callbacks.merging import finetuning_of, load_merged, save_merged
from lora_lightning.checkpoints import read_checkpoint
from lora_lightning.checkpoints.checkpoints import ADAPTER_KEY
from lora_lightning.cli.lightning_cli import LoRALightningCLI
from lora_lightning.data import MNISTDataModule
from lora_lightning.models import Classifier
from lora_lightning.repair.task import Method, Recipe

_OF_FULL_NETWORK = 0.1
"""Ratio of the learning rates for full fine-tuning and for adapters.

See https://thinkingmachines.ai/blog/lora, 'LoRA hyperparameters'.
"""
_SHARE = 0.2


class _FocusDataModule(LightningDataModule):
    """Names what `Configured` needs of a data module, for the type checker. The data modules of the package have it."""

    class_names: tuple[str, ...]
    focus: list[str] | list[int] | None
    focus_fraction: float


class Configured:
    """Describes the `Classifier`, the data module and the training of a configuration. This is a `Task`.

    Args:
        words: Command-line arguments: `--config`, and options of `fit` that override it.
        seed: Seed of the weights and of the order of the data.

    Raises:
        ValueError: If the model is not a `Classifier`, if the data module has no `focus`, or if its validation and test
            samples are not different.
    """

    noun = "class"
    share = _SHARE

    def __init__(self, words: list[str], seed: int) -> None:
        self.options, self._seed = words, seed
        cli = self._read()
        model, data = cli.model, cli.datamodule
        if not isinstance(model, Classifier):
            raise ValueError(f"The model is a {type(model).__name__}; repair needs a lora_lightning.Classifier.")
        if not _mixes_focus(data):
            named = "no data module" if data is None else type(data).__name__
            raise ValueError(
                f"The configuration has {named}; repair needs one that mixes classes in focus into batches: "
                "ImageFolderDataModule, TextDataModule or MNISTDataModule of lora_lightning."
            )
        _set_up(cli)
        _check_splits(data)
        self.names: tuple[str, ...] = tuple(data.class_names)
        self.description = shlex.join(words)
        batches, most, limit = len(data.train_dataloader()), cli.trainer.max_epochs, cli.trainer.max_steps
        lengths = [length for length in ((most or -1) * batches, limit) if length > 0]
        self.steps = min(lengths, default=batches)
        self.log_every_n_steps = 10 if batches >= 100 else 1
        self._callback = finetuning_of(cli.trainer)

    def model(self, method: Method = "adapters") -> Classifier:
        """Return the configured model.

        Full fine-tuning uses a tenth of the configured learning rate, which is meant for adapters.
        """
        model: Classifier = self._read().model
        if (facts := backbone_facts(model.backbone)) is not None:
            set_backbone_facts(model.backbone, replace(facts, new_head=()))  # it is trained as part of the base
        if method == "full network":
            configured = model.optimizer

            def slower(parameters: Iterable[Parameter]) -> Optimizer:
                optimizer = configured(parameters)
                for group in optimizer.param_groups:
                    group["lr"] *= _OF_FULL_NETWORK
                return optimizer

            model.optimizer = slower
        return model

    def evaluated(self) -> LightningDataModule:
        """Return the configured data."""
        data: LightningDataModule = self._read().datamodule
        return data

    def mixed(self, focus: tuple[int, ...] | None, share: float) -> LightningDataModule:
        """Return the configured data with these classes in focus."""
        cli = self._read()
        data: _FocusDataModule = cli.datamodule
        data.focus_fraction = share
        if focus is None:
            data.focus = None
        elif isinstance(data, MNISTDataModule):
            data.focus = list(focus)
        else:
            data.focus = [self.names[index] for index in focus]
        _set_up(cli)
        return data

    def adapters(self, rank: int, base: Path) -> LoRAFinetuning:
        """Return the configured callback, or a new one, with this rank and this base, and the same scale."""
        if self._callback is None:
            return LoRAFinetuning(rank=rank, base_checkpoint=base)
        config = self._callback.config
        alpha = None if config.alpha is None else config.alpha / config.rank * rank
        return LoRAFinetuning(
            base_checkpoint=base, **asdict(replace(config, rank=rank, alpha=alpha, modules_to_save=[]))
        )

    def recipe(self) -> Recipe:
        """Return the configured `fit`."""
        cli, description = self._read(), "trained by fit with this configuration, with merged adapters"
        return Recipe(description, cli.model, cli.datamodule, trainer=cli.trainer)

    def plain_base(self, checkpoint: Path, folder: Path) -> Path:
        """Return the checkpoint. If it contains adapters, return one in `folder` with merged adapters."""
        if read_checkpoint(checkpoint).get(ADAPTER_KEY) is None:
            return checkpoint
        folder.mkdir(parents=True, exist_ok=True)
        cli = self._read()
        load_merged(cli.trainer, cli.model, checkpoint)
        save_merged(cli.trainer, folder / "base.ckpt")
        return folder / "base.ckpt"

    def _read(self) -> LoRALightningCLI:
        return LoRALightningCLI([*self.options, "--seed_everything", str(self._seed)], run=False)


def _mixes_focus(data: LightningDataModule | None) -> TypeGuard[_FocusDataModule]:
    return hasattr(data, "focus") and hasattr(data, "focus_fraction")


def _set_up(cli: LoRALightningCLI) -> None:
    """Set up the data as a trainer does for this model, whose backbone may have the tokenizer."""
    cli.trainer.strategy.connect(cli.model)
    cli.datamodule.trainer = cli.trainer
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")


def _check_splits(data: LightningDataModule) -> None:
    validation = data.val_dataloader()
    if not validation:
        raise ValueError(
            "There are no validation data, and repair needs them for selection: set --data.val_fraction 0.2."
        )
    first, second = validation.dataset, data.test_dataloader().dataset
    if first is second or getattr(first, "files", None) == getattr(second, "files", ()):
        raise ValueError(
            "The test samples are the validation samples, and a repair that was selected on them cannot be judged on "
            "them: set data.test to a file, or for images add a folder test or set --data.test_fraction 0.2."
        )
