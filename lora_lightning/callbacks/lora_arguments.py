"""Converts the arguments of `LoRAFinetuning` to those of `LoRAConfig`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from lora_lightning.lora import LoRAConfig

LR_RATIO_IS_OF_THE_OPTIMIZER = (
    "lr_ratio (LoRA+) belongs to the optimizer. Use Classifier(lr_ratio=16) or --model.lr_ratio 16, or in a module of "
    "your own lora.lora_plus_param_groups(module, lr, lr_ratio) in configure_optimizers."
)
_NAMES_OF_OTHERS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "init_lora_weights": "init",
    "target_layers": "target_modules",
}
"""Arguments of PEFT and other libraries, and what they are called here."""


def plain_arguments(config: LoRAConfig | Mapping[str, Any] | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `LoRAConfig` for those of the callback.

    Lists and mappings of OmegaConf are converted to plain ones. An argument that is `None` has its default.

    Args:
        config: A configuration or its arguments.
        arguments: Further arguments, which go first.

    Raises:
        ValueError: If an argument is unknown, or `config` is something else.
    """
    if config is not None and not isinstance(config, LoRAConfig | Mapping):
        raise ValueError(f"LoRAFinetuning({config!r}): expected a LoRAConfig or its arguments by name, as rank=8.")
    given = asdict(config) if isinstance(config, LoRAConfig) else dict(config or {})
    given = {key: plain(value) for key, value in {**given, **arguments}.items()}
    if "lr_ratio" in given:
        raise ValueError(LR_RATIO_IS_OF_THE_OPTIMIZER)
    known = [field.name for field in fields(LoRAConfig)]
    for name in given:
        if name not in known:
            close = [_NAMES_OF_OTHERS[name]] if name in _NAMES_OF_OTHERS else difflib.get_close_matches(name, known, 1)
            hint = f"Is {close[0]!r} meant? " if close else ""
            raise ValueError(
                f"LoRAFinetuning has no argument {name!r}. {hint}It takes those of LoRAConfig: {', '.join(known)}."
            )
    bypass = given.get("bypass")
    if isinstance(bypass, list):
        given["bypass"] = tuple(bypass)
    return {name: value for name, value in given.items() if value is not None}


def describes_new_adapters(arguments: Mapping[str, Any]) -> bool:
    """Return whether any argument of `LoRAConfig` was chosen. A command line gives all of them, with their defaults."""
    default = LoRAConfig()
    all_given = all(name in arguments for name, value in asdict(default).items() if value is not None)
    return LoRAConfig(**arguments) != default or (bool(arguments) and not all_given)


def plain(value: object) -> Any:
    """Return a list or mapping of another library, such as OmegaConf, as a plain one."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    return value
