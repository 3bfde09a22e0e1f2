"""Keeps the hyper-parameters in a checkpoint from choosing what code runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace

from lora_lightning.checkpoints.checkpoints import explain_damage, paths_are_safe


@contextmanager
def only_configured_code(path: str | Path, settings: Callable[[], Namespace]) -> Iterator[None]:
    """Let `LightningCLI` parse the hyper-parameters in a checkpoint if they name no code but that of the configuration.

    Lightning imports and calls the classes and functions that hyper-parameters name, and reads the configuration files
    that they name.

    Args:
        path: The checkpoint.
        settings: Returns the configuration of the command, before and after parsing.

    Raises:
        ValueError: If a hyper-parameter names a class, a function, a text file or a URL that the configuration does
            not contain.
    """
    configured = set(_names(settings()))
    with explain_damage(path), paths_are_safe():
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("hyper_parameters", {})
        saved = {key: value for key, value in saved.items() if key != "_instantiator"}  # which Lightning drops
        foreign = [name for name in _names(saved) if name not in configured and _is_code(name)]
    if not foreign:
        yield
        # Classes that are imported already can be named without their module.
        foreign = [name for name in _chosen(settings().model) if name not in configured]
    if foreign:
        raise ValueError(
            f"The hyper-parameters in {path} name {foreign[0]!r}, which is not in the configuration. It is neither "
            "imported nor read, since this may run code. If you trust the checkpoint, name it in the configuration."
        )


def _names(value: Any) -> Iterator[str]:
    """Yield all strings in a value, also those in YAML in strings, as jsonargparse parses it."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _names(key)
            yield from _names(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _names(item)
    elif isinstance(value, str):
        yield value
        try:
            parsed = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):
            return
        if parsed != value:
            yield from _names(parsed)
    elif callable(value) and hasattr(value, "__qualname__"):
        yield f"{value.__module__}.{value.__qualname__}"


def _chosen(value: Any) -> Iterator[str]:
    """Yield the classes and functions in a parsed configuration."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        if isinstance(value.get("class_path"), str):
            yield value["class_path"]
        for item in value.values():
            yield from _chosen(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _chosen(item)
    elif callable(value):
        yield from _names(value)


def _is_code(name: str) -> bool:
    """Return whether jsonargparse could import a string, or read it as a file that names what to import."""
    if "://" in name or "::" in name:
        return True
    package, dot, _ = name.partition(".")
    try:
        if package and dot and find_spec(package) is not None:
            return True
        file = Path(name).expanduser()
        if not file.exists() or file.is_dir():
            return False
        if file.is_file():
            file.read_text("utf-8")
    except UnicodeDecodeError:
        return False  # no configuration file
    except (OSError, ValueError, RuntimeError, ImportError):
        # A name that is too long for a file, for example, is not one. A module such as __main__ may have no spec.
        return "." in name and package.isidentifier()
    return True
