"""Runs the commands: `fit`, `validate`, `test` and `predict` by `LightningCLI`, and `merge`, `export`, `report` and `repair`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable
from inspect import signature
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed
from typing_extensions import override

from lora_lightning.callbacks import PredictionWriter
from lora_lightning.cli.checkpoint_settings import only_configured_code
from lora_lightning.cli.closing import show_closing
from lora_lightning.cli.cpu import tune_for_cpu
from lora_lightning.cli.errors import explain, named_class
from lora_lightning.cli.export import export
from lora_lightning.cli.head import size_head
from lora_lightning.cli.lora_options import add_lora_options, apply_lora_options, is_lora_finetuning
from lora_lightning.cli.merge import merge_checkpoint
from lora_lightning.cli.progress_lines import ProgressLines
from lora_lightning.cli.saved_config import SaveSharedConfig
from lora_lightning.resume.atomic_checkpoint import write_atomically
from lora_lightning.resume.checkpoints import (
    check_file,
    explain_damage,
    last_checkpoint,
    newest_checkpoint,
    paths_are_safe,
)
from lora_lightning.resume.started_from import StartedFrom
from lora_lightning.resume.stop_after_batch import StopAfterBatch

DEBUG_VARIABLE = "LORA_LIGHTNING_DEBUG"
NO_ADAPTER = "none"
_FUNCTIONS: dict[str, Callable[..., Path]] = {"merge": merge_checkpoint, "export": export}
_OBJECTS = ("trainer", "model", "datamodule")
_KEYWORDS = ("best", "hpc")
_SWITCHED_BY: dict[str, type] = {"enable_progress_bar": ProgressBar, "enable_checkpointing": Checkpoint}
_NOISE = (
    # Data in memory needs no workers.
    ".*does not have many workers.*",
    # val_fraction=0 leaves no validation data, on purpose.
    "Total length of `list` across ranks is zero.*",
    # Arguments given by a Python caller are not a mistake.
    "LightningCLI's args parameter is intended to run from within Python.*",
    # A test or a resumed run has its own log folder, on purpose.
    "The dirpath has changed from.*",
    # Raised by Lightning 2.6.6 with PyTorch 2.15. Users cannot change it.
    ".*isinstance\\(treespec, LeafSpec\\).*",
)
_ADVERTISEMENT = "Tip: For seamless"
_DESCRIPTION = (
    "Train a classifier, fine-tune it with LoRA, and see what changed, class by class. Further commands have their own help: "
    "'lora-lightning merge --help' (merge adapters into a plain checkpoint), 'lora-lightning export --help' (write an ONNX file), "
    "'lora-lightning report --help' (compare runs) and 'lora-lightning repair --help' (find and repair a weak class)."
)


_ADAPTER_HELP = (
    "Folder of adapters from fit or PEFT, or a log folder, whose newest adapter is used, or 'none' for the base. "
    "With it, ckpt_path is the checkpoint of the base."
)


class LoRALightningCLI(LightningCLI):
    """`LightningCLI` with a fixed default seed, which accepts a log folder for the newest checkpoint in it.

    Args:
        args: The command-line arguments.
        run: Whether the first argument is a command to run. If not, the options are those of `command`.
        command: `merge` or `export`.
    """

    def __init__(self, args: ArgsType = None, run: bool = True, command: str = "merge") -> None:
        self.function = None if run else _FUNCTIONS[command]
        commands = self.subcommands() if run else ()
        super().__init__(
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=SaveSharedConfig,
            parser_kwargs={
                "description": str(self.function.__doc__).partition("\n")[0] if self.function else _DESCRIPTION,
                "prog": "lora-lightning" if run else f"lora-lightning {command}",
                "exit_on_error": False,
                **{command: {"exit_on_error": False} for command in commands},
            },
            args=args,
            run=run,
        )

    @property
    def settings(self) -> Namespace:
        """Return the configuration of the command, if any."""
        settings: Namespace = self.config.get(str(self.config.get("subcommand")), self.config)
        return settings

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        # The metrics that `verbose` prints are shown, rounded, at the end of the run.
        commands = LightningCLI.subcommands()
        return commands | {name: commands[name] | {"verbose"} for name in ("validate", "test")}

    def validate(self, *args: Any, **options: Any) -> None:
        """Run `validate` of the trainer without its table of metrics, since the closing lines show them."""
        self.trainer.validate(*args, **options | {"verbose": False})

    def test(self, *args: Any, **options: Any) -> None:
        """Run `test` of the trainer without its table of metrics, since the closing lines show them."""
        self.trainer.test(*args, **options | {"verbose": False})

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add_lora_options(parser)
        super().add_core_arguments_to_parser(parser)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"trainer.enable_model_summary": False})  # it cannot count FLOPs without an example input
        parser.add_argument("--adapter", type=str | None, help=_ADAPTER_HELP)
        if self.function is not None:
            parser.add_function_arguments(self.function, skip=set(_OBJECTS))

    @override
    def before_instantiate_classes(self) -> None:
        """Apply `enable_progress_bar: false`, `--lora` and `--adapter` to the configured callbacks, and set the size of the head."""
        trainer = self.settings.trainer
        off = tuple(kind for option, kind in _SWITCHED_BY.items() if trainer.get(option) is False)
        if off and isinstance(trainer.callbacks, list):
            trainer.callbacks = [
                each for each in trainer.callbacks if not issubclass(named_class(each.class_path), off)
            ]
        apply_lora_options(self.settings)
        size_head(self.settings)
        if self.settings.adapter is not None:
            self._use_adapter(self.settings.adapter)

    def _use_adapter(self, adapter: str) -> None:
        settings = self.settings
        listed = settings.trainer.callbacks or []
        callbacks = list(listed) if isinstance(listed, list) else [listed]
        ours = [each for each in callbacks if is_lora_finetuning(each)]
        others = [each for each in callbacks if not is_lora_finetuning(each)]
        arguments: Any = ours[0].init_args if ours else Namespace()  # type: ignore[no-untyped-call]
        base, settings.ckpt_path = settings.ckpt_path or arguments.get("base_checkpoint"), None
        if adapter == NO_ADAPTER:
            rank_zero_info("Adapter: none, only the base is used.")
            settings.trainer.callbacks = others
            settings.ckpt_path = None if base is None else str(newest_checkpoint(base))
            return
        arguments.adapter, arguments.base_checkpoint = adapter, base
        ours = [Namespace(class_path="lora_lightning.LoRAFinetuning", init_args=arguments)]  # type: ignore[no-untyped-call]
        settings.trainer.callbacks = [*ours, *others]

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        configured = self.config_init.get(str(self.config.get("subcommand")), self.config_init).trainer
        listed = configured.callbacks or []
        each = list(listed) if isinstance(listed, list) else [listed]
        if configured.enable_progress_bar is not False and not sys.stdout.isatty():
            others = [callback for callback in each if type(callback) not in (RichProgressBar, TQDMProgressBar)]
            each = others if any(isinstance(other, ProgressBar) for other in others) else [*others, ProgressLines()]
        summary = configured.enable_model_summary or any(isinstance(callback, ModelSummary) for callback in each)
        trainer = super().instantiate_trainer(**{"callbacks": each, "enable_model_summary": summary} | kwargs)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined] # Trainer sets it from elsewhere
        if self.subcommand == "fit":
            callbacks[:0] = [StopAfterBatch(), StartedFrom()]
        if self.subcommand == "predict" and not any(isinstance(each, PredictionWriter) for each in callbacks):
            callbacks.append(PredictionWriter())
        trainer.strategy.checkpoint_io = write_atomically(trainer.strategy.checkpoint_io)
        return trainer

    @override
    def _parse_ckpt_path(self) -> None:
        """Read the hyper-parameters of the model from the checkpoint as Lightning does, unless it is damaged."""
        path = self.settings.get("ckpt_path")
        if not _is_local_file(path):
            return
        check_file(Path(path))
        with only_configured_code(path, lambda: self.settings), explain_damage(path), paths_are_safe():
            super()._parse_ckpt_path()

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        command, settings = self.config.get("subcommand"), self.settings
        path, callbacks = settings.get("ckpt_path"), settings.trainer.callbacks
        each = callbacks if isinstance(callbacks, list) else [callbacks]
        if command == "predict" and path is None and settings.adapter is None and any(map(is_lora_finetuning, each)):
            path = "last"  # instead of untrained adapters
        if path == "last":
            folder = _log_folder(settings.trainer.logger)
            found = last_checkpoint(folder)
            settings.ckpt_path = None if found is None else str(found)
            nothing = "starting from the beginning" if command == "fit" else "the configured model is used"
            rank_zero_info(f"Checkpoint: {found}" if found else f"No checkpoint in {folder}: {nothing}.")
            return
        if not _is_local_file(path):
            return
        settings.ckpt_path = str(newest_checkpoint(path))
        if settings.ckpt_path != str(path):
            rank_zero_info(f"Checkpoint: {settings.ckpt_path}")


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return _ADVERTISEMENT not in str(record.msg)


def _is_local_file(path: Any) -> bool:
    return path is not None and path not in _KEYWORDS and "://" not in str(path)


def _log_folder(logger: Any) -> Path:
    """Return the folder in which a configured logger creates `version_N`."""
    settings = getattr(logger, "init_args", None) or {}
    return Path(settings.get("save_dir") or ".") / (settings.get("name") or "lightning_logs")


def main(args: list[str] | None = None) -> int:
    """Run one command.

    Args:
        args: The arguments after `lora-lightning`. By default those of this process.

    Returns:
        The exit code: 0, or 1 if the command failed or was interrupted, or 2 for an error in the arguments.
    """
    words = sys.argv[1:] if args is None else args
    tune_for_cpu()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every encoding has the characters of progress bars and tables
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    # Both packages log with the logger of the one that was imported last.
    for package in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(f"{package}.utilities.rank_zero").addFilter(_is_no_advertisement)
    try:
        return _run(words, args)
    except (ArgumentError, ValueError, OSError, RuntimeError, MisconfigurationException) as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"lora-lightning: error: {explain(error, words)}", file=sys.stderr)
        print(f"(--help lists the options; {DEBUG_VARIABLE}=1 shows the traceback.)", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1
    except (KeyboardInterrupt, SystemExit) as stop:
        # On Ctrl-C, Lightning closes its loggers and exits with code 1.
        if isinstance(stop, SystemExit) and not isinstance(stop, SIGTERMException) and stop.code != 1:
            raise
        go_on = " --ckpt_path last resumes from there." if words[:1] == ["fit"] else ""
        print(f"lora-lightning: interrupted. All files written so far are kept.{go_on}", file=sys.stderr)
        return 1


def _run(words: list[str], args: list[str] | None) -> int:
    if words[:1] == ["repair"]:
        from lora_lightning.cli.repair import repair_command

        return repair_command(words[1:])
    if words[:1] == ["report"]:
        from lora_lightning.cli.report import report

        return report(words[1:])
    if words and (function := _FUNCTIONS.get(words[0])):
        cli = LoRALightningCLI(words[1:], run=False, command=words[0])
        options = {name: cli.config_init[name] for name in signature(function).parameters if name not in _OBJECTS}
        function(cli.trainer, cli.model, cli.datamodule, **options)
        return 0
    cli = LoRALightningCLI(args)
    show_closing(cli.trainer, str(cli.subcommand), words)
    if distributed.is_available() and distributed.is_initialized():
        # Lightning leaves the threads of gloo running, and the process may abort when it exits. Other nodes of torchrun would
        # wait five minutes for it.
        distributed.destroy_process_group()
    return 0
