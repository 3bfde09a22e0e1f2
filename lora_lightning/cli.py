"""The command line: `fit`, `validate`, `test`, `predict` by `LightningCLI`, `merge` and `repair` beside them."""

from __future__ import annotations

import os
import sys
import warnings
from argparse import ArgumentError
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lora_lightning.callbacks import AtomicCheckpointIO, Predictions
from lora_lightning.callbacks.stop_after_batch import StopAfterBatch
from lora_lightning.checkpoints import check_file, explain_damage, last_checkpoint, newest_checkpoint
from lora_lightning.cpu import tune_for_cpu
from lora_lightning.errors import explain
from lora_lightning.trainer import LoRATrainer

DEBUG_VARIABLE = "LORA_LIGHTNING_DEBUG"
_KEYWORDS = ("best", "hpc")
_NOISE = (
    # Data in memory needs no workers.
    ".*does not have many workers.*",
    # val_fraction=0 leaves nothing to validate on, on purpose.
    "Total length of `list` across ranks is zero.*",
    # Arguments given by a Python caller are no mistake.
    "LightningCLI's args parameter is intended to run from within Python.*",
    # A test or a resumed run has a log folder of its own, on purpose.
    "The dirpath has changed from.*",
    # Lightning 2.6.6 under PyTorch 2.15; nothing that a user could change.
    ".*isinstance\\(treespec, LeafSpec\\).*",
)
_DESCRIPTION = (
    "Train a classifier, fine-tune it with LoRA, and see class by class what that changed. "
    "Beside the commands below: 'lora-lightning repair', the whole story on MNIST in one command "
    "('lora-lightning repair --help')."
)


class LoRALightningCLI(LightningCLI):
    """`LightningCLI` with a fixed default seed, for which a log folder is a checkpoint too: its newest one."""

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            trainer_class=LoRATrainer,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={
                "description": _DESCRIPTION,
                "prog": "lora-lightning",
                "exit_on_error": False,
                **{command: {"exit_on_error": False} for command in self.subcommands()},
            },
            args=args,
        )

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "merge": {"model", "datamodule"}}

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand == "fit":
            trainer.callbacks.insert(0, StopAfterBatch())  # type: ignore[attr-defined] # Trainer sets it from elsewhere
        if self.subcommand == "predict" and not any(isinstance(each, Predictions) for each in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.callbacks.append(Predictions())  # type: ignore[attr-defined]
        trainer.strategy.checkpoint_io = AtomicCheckpointIO(trainer.strategy.checkpoint_io)
        return trainer

    @override
    def _parse_ckpt_path(self) -> None:
        """Lightning reads the model's hyper-parameters from the checkpoint, and does not expect a damaged one."""
        path = self.config[self.config.subcommand].get("ckpt_path")
        if not _is_local_file(path):
            super()._parse_ckpt_path()
            return
        check_file(Path(path))
        with explain_damage(path):
            super()._parse_ckpt_path()

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        command = self.config.subcommand
        config = self.config[command]
        path = config.get("ckpt_path")
        if command == "predict" and path is None and config.adapter is None and _adapts(config.trainer.callbacks):
            path = "last"  # fresh adapters are not what was asked for
        if path == "last":
            folder = _log_folder(config.trainer.logger)
            found = last_checkpoint(folder)
            config.ckpt_path = None if found is None else str(found)
            nothing = "beginning anew" if command == "fit" else "the model is used as it is configured"
            rank_zero_info(f"Checkpoint: {found}" if found else f"No checkpoint in {folder}: {nothing}.")
            return
        if not _is_local_file(path):
            return
        config.ckpt_path = str(newest_checkpoint(path))
        if config.ckpt_path != str(path):
            rank_zero_info(f"Checkpoint: {config.ckpt_path}")


def _is_local_file(path: Any) -> bool:
    return path is not None and path not in _KEYWORDS and "://" not in str(path)


def _adapts(callbacks: Any) -> bool:
    """Whether a LoRAFinetuning is among configured callbacks."""
    each = callbacks if isinstance(callbacks, list) else [callbacks]
    return any(str(getattr(callback, "class_path", "")).endswith(".LoRAFinetuning") for callback in each)


def _log_folder(logger: Any) -> Path:
    """Where a configured logger makes its `version_N`."""
    settings = getattr(logger, "init_args", None) or {}
    return Path(settings.get("save_dir") or ".") / (settings.get("name") or "lightning_logs")


def main(args: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        args: The words after `lora-lightning`; by default those of this process.

    Returns:
        The exit code: 0, or 1 if the command failed or was interrupted, or 2 for an error in the arguments.
    """
    words = sys.argv[1:] if args is None else args
    tune_for_cpu()
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    try:
        return _run(words, args)
    except (ArgumentError, ValueError, OSError, RuntimeError, MisconfigurationException) as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"lora-lightning: error: {explain(error)}", file=sys.stderr)
        print(f"(--help lists what can be said; {DEBUG_VARIABLE}=1 shows the traceback.)", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning answers Ctrl-C by closing its loggers and leaving with code 1.
        if isinstance(stop, SystemExit) and not isinstance(stop, SIGTERMException) and stop.code != 1:
            raise
        go_on = " --ckpt_path last goes on from there." if words[:1] == ["fit"] else ""
        print(f"lora-lightning: interrupted. What was written so far is kept.{go_on}", file=sys.stderr)
        return 1


def _run(words: list[str], args: list[str] | None) -> int:
    if words[:1] == ["repair"]:
        from lora_lightning.repair import repair

        outcome: Any = auto_cli(
            repair, args=words[1:], as_positional=False, prog="lora-lightning repair", exit_on_error=False
        )
        return int(outcome)
    LoRALightningCLI(args)
    return 0
