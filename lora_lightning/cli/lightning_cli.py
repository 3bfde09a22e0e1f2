"""Defines `LoRALightningCLI`, which runs `fit`, `validate`, `test`, `predict`, `merge`, `export` and `find-lr`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    Checkpoint,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from rich import get_console
from typing_extensions import override

from lora_lightning.callbacks import PredictionWriter
from lora_lightning.callbacks.loss_bar import LossBar
from lora_lightning.checkpoints import last_checkpoint, newest_checkpoint
from lora_lightning.checkpoints.atomic_checkpoint import write_atomically
from lora_lightning.checkpoints.checkpoints import (
    check_file,
    choice_in_words,
    doubt_about_choice,
    explain_damage,
    paths_are_safe,
)
from lora_lightning.checkpoints.started_from import StartedFrom
from lora_lightning.checkpoints.stop_after_batch import StopAfterBatch
from lora_lightning.cli.checkpoint_settings import only_configured_code
from lora_lightning.cli.errors import named_class, unknown_options_explained
from lora_lightning.cli.export import export
from lora_lightning.cli.find_lr import find_lr
from lora_lightning.cli.head import size_head
from lora_lightning.cli.lora_options import (
    add_lora_options,
    apply_lora_options,
    configured_callbacks,
    is_lora_finetuning,
)
from lora_lightning.cli.merge import merge
from lora_lightning.cli.progress_lines import ProgressLines
from lora_lightning.cli.saved_config import SaveSharedConfig

NO_ADAPTER = "none"
_WIDE = 120
"""Columns of a terminal in which the metrics of a progress bar fit beside it."""
FUNCTIONS: dict[str, Callable[..., Path]] = {"merge": merge, "export": export, "find-lr": find_lr}
"""Commands that are functions of a trainer, a model and a data module."""
_OBJECTS = ("trainer", "model", "datamodule")
_KEYWORDS = ("best", "hpc")
_SWITCHED_BY: dict[str, type] = {"enable_progress_bar": ProgressBar, "enable_checkpointing": Checkpoint}
_DESCRIPTION = (
    "Train a classifier, fine-tune it with LoRA, and see what changed, class by class. Further commands have their own "
    "help: 'lora-lightning merge --help' (merge adapters into a plain checkpoint), 'lora-lightning export --help' "
    "(write an ONNX file), 'lora-lightning find-lr --help' (try learning rates), 'lora-lightning report --help' "
    "(compare runs) and 'lora-lightning repair --help' (find and repair a weak class)."
)


_ADAPTER_HELP = (
    "Folder of adapters from fit or PEFT, or a log folder, whose newest adapter is used, or 'none' for the base. "
    "With it, ckpt_path is the checkpoint of the base."
)


class LoRALightningCLI(LightningCLI):
    """`LightningCLI` with a fixed default seed, which accepts a log folder for its newest finished run.

    Args:
        args: The command-line arguments.
        run: Whether the first argument is a command to run. If not, the options are those of `command`.
        command: `merge`, `export` or `find-lr`.
    """

    def __init__(self, args: ArgsType = None, run: bool = True, command: str = "merge") -> None:
        self.function = None if run else FUNCTIONS[command]
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

    def run_function(self) -> Path:
        """Run the function of the command with its options, and return the path of the written file."""
        assert self.function is not None
        names = [name for name in signature(self.function).parameters if name not in _OBJECTS]
        options = {name: self.config_init[name] for name in names}
        return self.function(self.trainer, self.model, self.datamodule, **options)

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
        """Apply `enable_progress_bar: false`, `--lora` and `--adapter`, and set the size of the head."""
        trainer = self.settings.trainer
        off = tuple(kind for option, kind in _SWITCHED_BY.items() if trainer.get(option) is False)
        if off and isinstance(trainer.callbacks, list):
            callbacks: list[Namespace] = trainer.callbacks
            trainer.callbacks = [
                callback for callback in callbacks if not issubclass(named_class(callback.class_path), off)
            ]
        apply_lora_options(self.settings)
        size_head(self.settings)
        if self.settings.adapter is not None:
            self._use_adapter(self.settings.adapter)

    def _use_adapter(self, adapter: str) -> None:
        settings = self.settings
        callbacks = configured_callbacks(settings.trainer)
        ours = [callback for callback in callbacks if is_lora_finetuning(callback)]
        others = [callback for callback in callbacks if not is_lora_finetuning(callback)]
        arguments: Namespace = ours[0].init_args if ours else Namespace()  # type: ignore[no-untyped-call]
        base = settings.get("ckpt_path") or arguments.get("base_checkpoint")
        if "ckpt_path" in settings:
            settings.ckpt_path = None
        elif adapter == NO_ADAPTER:
            raise ValueError(f"--adapter {NO_ADAPTER} is for commands with --ckpt_path.")
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
        callbacks: list[Callback] = configured_callbacks(configured)
        if configured.enable_progress_bar is not False and not sys.stdout.isatty():
            callbacks = [callback for callback in callbacks if type(callback) not in (RichProgressBar, TQDMProgressBar)]
            if not any(isinstance(callback, ProgressBar) for callback in callbacks):
                callbacks.append(ProgressLines())
        if get_console().width < _WIDE:
            callbacks = [_narrow(each) if type(each) is RichProgressBar else each for each in callbacks]
        summary = configured.enable_model_summary or any(isinstance(callback, ModelSummary) for callback in callbacks)
        trainer = super().instantiate_trainer(**{"callbacks": callbacks, "enable_model_summary": summary} | kwargs)
        of_trainer: list[Callback] = trainer.callbacks  # type: ignore[attr-defined] # Trainer sets it from elsewhere
        if self.subcommand == "fit":
            of_trainer[:0] = [StopAfterBatch(), StartedFrom()]
        if self.subcommand == "predict" and not any(isinstance(callback, PredictionWriter) for callback in of_trainer):
            of_trainer.append(PredictionWriter())
        trainer.strategy.checkpoint_io = write_atomically(trainer.strategy.checkpoint_io)
        _save_no_exceptions_of_one_device(trainer)
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
        parsers = {} if self.function else self._subcommand_parsers
        named = next((word for word in _words(args) if word in parsers), None)
        with unknown_options_explained(parsers[named] if named else parser):
            super().parse_arguments(parser, args)
        command, settings = self.config.get("subcommand"), self.settings
        path = settings.get("ckpt_path")
        adapts = any(map(is_lora_finetuning, configured_callbacks(settings.trainer)))
        if command == "predict" and path is None and settings.adapter is None and adapts:
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
            chosen = Path(settings.ckpt_path)
            rank_zero_info(f"Checkpoint: {choice_in_words(chosen)} {doubt_about_choice(path, chosen)}".rstrip())


def _words(args: ArgsType) -> list[str]:
    """Return the command-line arguments, if that is what they are."""
    return sys.argv[1:] if args is None else [str(word) for word in args] if isinstance(args, list) else []


def _save_no_exceptions_of_one_device(trainer: Trainer) -> None:
    """Switch `save_on_exception` off on several devices, where one that fails would wait for the others for ever.

    A checkpoint is saved by all devices together (https://github.com/Lightning-AI/pytorch-lightning/issues/20187).
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined] # Trainer sets it from elsewhere
        if trainer.world_size > 1 and isinstance(callback, ModelCheckpoint):
            callback.save_on_exception = False


def _narrow(bar: RichProgressBar) -> LossBar:
    """Return a bar that does not wrap its metrics in a narrow terminal."""
    return LossBar(refresh_rate=int(bar.refresh_rate), leave=bar._leave, theme=bar.theme)


def _is_local_file(path: str | Path | None) -> bool:
    return path is not None and path not in _KEYWORDS and "://" not in str(path)


def _log_folder(logger: Any) -> Path:
    """Return the folder in which a configured logger creates `version_N`."""
    settings = getattr(logger, "init_args", None) or {}
    return Path(settings.get("save_dir") or ".") / (settings.get("name") or "lightning_logs")
