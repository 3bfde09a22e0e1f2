"""Finding and reading checkpoints: a file, or a log folder whose newest checkpoint is meant."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch

ADAPTER_KEY = "lora_lightning"
"""Entry of a checkpoint that holds adapters: their configuration, and the base's fingerprint and path."""


def newest_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that `path` means: itself if it is a file, else the newest `*.ckpt` in or below the folder.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; expected a checkpoint, or a log folder that holds one.")
    found = sorted(path.rglob("*.ckpt"), key=lambda file: (file.stat().st_mtime_ns, file))
    if not found:
        raise FileNotFoundError(f"{path} holds no checkpoint (*.ckpt); run fit first, or name another folder.")
    return found[-1]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a Lightning checkpoint on the CPU, without running code from it.

    Raises:
        ValueError: If the file is damaged, or not a Lightning checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, BadZipFile, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is damaged or no checkpoint ({reason}). Choose another one.") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"{path} is no Lightning checkpoint: it has no 'state_dict'. Choose another one.")
    return checkpoint
