"""Supports names of layers relative to the `LightningModule` in a configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lora_lightning.lora import LoRAConfig
from lora_lightning.lora.matching import Names, exactly


def relative_names(config: LoRAConfig, pl_module: LightningModule, adapted: nn.Module) -> LoRAConfig:
    """Return the configuration with names relative to the adapted child: `net.0` becomes `0` if `net` is adapted.

    A name that already matches is not changed.
    """
    prefix = next(name for name, module in pl_module.named_modules() if module is adapted)
    if not prefix:
        return config
    names = [name for name, _ in adapted.named_modules()] + [name for name, _ in adapted.named_parameters()]
    found: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in ("target_modules", "exclude_modules", "target_parameters", "modules_to_save"):
            found[field.name] = value if value == "all" else _relative(value, prefix, names)
        elif field.name in ("rank_pattern", "alpha_pattern"):
            found[field.name] = {_shortened(key, {key: 0}, prefix, names): each for key, each in value.items()}
    return replace(config, **found)


def _relative(patterns: str | list[str], prefix: str, names: list[str]) -> str | list[str]:
    if isinstance(patterns, list):
        return [_shortened(each, [each], prefix, names) for each in patterns]
    as_it_is = Names(patterns)
    if any(map(as_it_is.match, names)):
        return patterns
    matched = [name for name in names if as_it_is.match(f"{prefix}.{name}")]
    return exactly(matched, names) if matched else patterns


def _shortened(key: str, patterns: Any, prefix: str, names: Iterable[str]) -> str:
    start = next((each for each in (f"{prefix}.", re.escape(f"{prefix}.")) if key.startswith(each)), None)
    return key if start is None or any(map(Names(patterns).match, names)) else key.removeprefix(start)
