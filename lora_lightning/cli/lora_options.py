"""Adds command-line options for the settings of `LoRAFinetuning`, such as `--lora.rank 4`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_type_hints

from docstring_parser import parse
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from lora_lightning.callbacks import LoRAFinetuning
from lora_lightning.callbacks.lora_arguments import LR_RATIO_IS_OF_THE_OPTIMIZER
from lora_lightning.checkpoints import newest_adapter, newest_checkpoint
from lora_lightning.checkpoints.checkpoints import doubt_about_choice
from lora_lightning.lora import LoRAConfig

_OWN = {
    "base_checkpoint": str | None,
    "weights_only": bool | None,
    "adapter": list[str] | str | None,
    "checkpoints": Literal["adapters", "full"] | None,
    "verify": bool | None,
}


def add_lora_options(parser: LightningArgumentParser) -> None:
    """Add options for the arguments of `LoRAFinetuning`.

    Options that are not given do not change the configuration.
    """
    group = parser.add_argument_group("LoRA: settings of the callback LoRAFinetuning, which is added if necessary")
    described = {
        parameter.arg_name: parameter.description
        for parameter in [*parse(LoRAConfig.__doc__ or "").params, *parse(LoRAFinetuning.__doc__ or "").params]
    }
    types = get_type_hints(LoRAConfig)
    for name in LoRAConfig.__dataclass_fields__:
        group.add_argument(f"--lora.{name}", type=types[name] | None, default=None, help=_help(described[name]))
    for name, kind in _OWN.items():
        group.add_argument(f"--lora.{name}", type=kind, default=None, help=_help(described[name]))
    group.add_argument("--lora.lr_ratio", type=float | None, default=None, help="See --model.lr_ratio.")


def _help(description: str | None) -> str:
    return " ".join((description or "").split())


def apply_lora_options(settings: Namespace) -> None:
    """Apply the options to the callback in the configuration, and resolve its paths to files.

    The configuration in the folder of the run then refers to the same files later.
    """
    options: Namespace = settings.pop("lora", Namespace())  # type: ignore[no-untyped-call]
    given = {name: value for name, value in options.as_dict().items() if value is not None}
    if "lr_ratio" in given:
        raise ValueError(LR_RATIO_IS_OF_THE_OPTIMIZER)
    of_config = [f"--lora.{name}" for name in given if name in LoRAConfig.__dataclass_fields__]
    if isinstance(given.get("adapter"), str) and of_config:
        raise ValueError(
            f"--lora.adapter {given['adapter']} starts from adapters that have their configuration: "
            f"{', '.join(of_config)} would have no effect. Leave one of them out, or name the folder "
            "in a list to keep these adapters frozen and train new ones beside them."
        )
    callbacks = configured_callbacks(settings.trainer)
    ours = [callback for callback in callbacks if is_lora_finetuning(callback)]
    if given and not ours:
        ours = [Namespace(class_path="lora_lightning.LoRAFinetuning", init_args=Namespace())]  # type: ignore[no-untyped-call]
        settings.trainer.callbacks = [*callbacks, *ours]
    for callback in ours:
        arguments = callback.get("init_args") or Namespace()  # type: ignore[no-untyped-call]
        callback.init_args = arguments
        for name, value in given.items():
            arguments[name] = value
        for name, newest in (("base_checkpoint", newest_checkpoint), ("adapter", newest_adapter)):
            given_paths = arguments.get(name)
            if isinstance(given_paths, list):
                arguments[name] = [str(newest(path)) if Path(path).is_dir() else path for path in given_paths]
            elif given_paths is not None and Path(given_paths).is_dir():
                chosen = newest(given_paths)
                arguments[name] = str(chosen)
                if doubt := doubt_about_choice(given_paths, chosen):
                    rank_zero_info(f"{name}: {doubt}")


def configured_callbacks(trainer: Namespace) -> list[Any]:
    """Return the callbacks of a configured trainer, which may be one, several or none."""
    listed = trainer.callbacks or []
    return list(listed) if isinstance(listed, list) else [listed]


def is_lora_finetuning(callback: Any) -> bool:
    """Return whether this is the configuration of the callback."""
    return str(getattr(callback, "class_path", "")).endswith(".LoRAFinetuning")
