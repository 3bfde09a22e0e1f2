"""Saves the configuration of a run such that every command can read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from typing_extensions import override

from lora_lightning.cli.failed_start import FailedStart
from lora_lightning.report.files import free_name

_OF_ONE_COMMAND = ("return_predictions",)


class SaveSharedConfig(SaveConfigCallback):
    """Saves the configuration of the run without settings of single commands.

    If the file exists, for example in the working directory for a second run without a logger, it is named
    `config-v1.yaml`. A run that fails before its first step leaves no log folder.

    Args:
        parser: See `SaveConfigCallback`.
        config: See `SaveConfigCallback`.
        options: Options of `SaveConfigCallback`.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **options: Any) -> None:
        shared: Namespace = config.clone()
        for name in _OF_ONE_COMMAND:
            shared.pop(name, None)
        if shared.get("weights_only") is None:
            shared.pop("weights_only", None)
        super().__init__(parser, shared, **options)
        self._start = FailedStart()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.already_saved:
            name = Path(free_name(trainer.log_dir or ".", self.config_filename)).name
            self.config_filename = trainer.strategy.broadcast(name)
        super().setup(trainer, pl_module, stage)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._start.clean_up(trainer, exception)
