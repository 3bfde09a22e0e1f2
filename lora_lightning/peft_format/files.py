"""Reads and writes the two files of an adapter folder: `adapter_config.json` and `adapter_model.safetensors`.

Older versions of PEFT wrote `adapter_model.bin`, which is read as well.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_lightning.checkpoints.checkpoints import check_file, explain_damage
from lora_lightning.peft_format.mapping import PREFIX, base_key, own_key

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
OLD_WEIGHTS_NAME = "adapter_model.bin"
"""The file that PEFT wrote before version 0.5, and later with `safe_serialization=False`."""
_DIGEST, _CONFIG_DIGEST = "lora_lightning_sha256", "lora_lightning_config_sha256"
"""Metadata of the weights: SHA-256 digests of the rest of the file and of the configuration, which the format lacks."""


def write_files(
    folder: Path, description: dict[str, Any], tensors: dict[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write both files of a folder.

    Each file is written atomically. The configuration, which makes the folder an adapter, is written last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(description, indent=2) + "\n"
    metadata = {"format": "pt", _CONFIG_DIGEST: hashlib.sha256(text.encode()).hexdigest(), **metadata}
    unfinished = folder / f".{WEIGHTS_NAME}.unfinished"
    save_file(tensors, unfinished, metadata={**metadata, _DIGEST: _digest(tensors, metadata)})
    described = folder / f".{CONFIG_NAME}.unfinished"
    described.write_text(text)
    shutil.copymode(described, unfinished)  # safetensors makes files readable only by their owner
    unfinished.replace(folder / WEIGHTS_NAME)
    described.replace(folder / CONFIG_NAME)


def read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, as save_adapter and PEFT "
            "write it."
        )
    try:
        description = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Write the adapter again.") from None
    if not isinstance(description, dict):
        raise ValueError(f"{path} contains a {type(description).__name__}; expected the configuration of an adapter.")
    return description


@dataclass(frozen=True)
class Content:
    """Holds the tensors of a folder."""

    adapters: dict[str, Tensor]
    """Tensors of adapters, by state-dict key."""
    saved: dict[str, Tensor]
    """Tensors of modules that are trained in full, by state-dict key."""
    base: dict[str, Tensor]
    """Tensors of the base, by state-dict key. PEFT saves the weights of adapted embeddings."""


def read_content(path: Path, description: dict[str, Any], module: nn.Module) -> Content:
    tensors, metadata = _read(path)
    # A file with a flipped bit in the name of its checksum must not be mistaken for a file of PEFT, which has no
    # checksum.
    written_here = any(key.startswith("lora_lightning") for key in metadata)
    if written_here and metadata.get(_DIGEST) != _digest(tensors, metadata):
        raise ValueError(f"{path} is damaged: its checksum does not match its content. Write the adapter again.")
    tensors = {key: value for key, value in tensors.items() if not _is_second_copy(key, tensors)}
    state = module.state_dict()
    own = {key: name for key in tensors if (name := own_key(key))}
    saved = {key: name for key in tensors if key not in own and (name := _saved_key(key, description)) is not None}
    base = {
        key: name
        for key in tensors
        if key not in own and key not in saved and (name := base_key(key)) is not None and name in state
    }
    foreign = [key for key in tensors if key not in own and key not in saved and key not in base]
    if foreign or not own:
        found = f"contains {', '.join(foreign[:5])}" if foreign else "is empty"
        raise ValueError(f"{path} {found}; expected only keys like '{PREFIX}<layer>.lora_A.weight'.")
    return Content(*({names[key]: tensors[key] for key in names} for names in (own, saved, base)))


def weights_file(folder: Path) -> Path:
    """Return the file with the weights: that of safetensors, unless there is only the one of older versions of PEFT."""
    new, old = folder / WEIGHTS_NAME, folder / OLD_WEIGHTS_NAME
    return old if old.is_file() and not new.exists() else new


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file with weights. Reading it runs no code, whatever it contains."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Expected the weights of the adapter next to its {CONFIG_NAME}."
        )
    if path.name == OLD_WEIGHTS_NAME:
        check_file(path)
        with explain_damage(path):
            found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            raise ValueError(f"{path} holds something other than tensors by name. Write the adapter again.")
        return {str(key): value for key, value in found.items()}, {}
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 - not a dictionary
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}). Write the adapter again.") from None


def _is_second_copy(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a key is that of a bias in a wrapper of PEFT, which `bias="all"` writes beside the bias itself."""
    owner, _, wrapper = key.removesuffix(".bias").rpartition(".")
    return key.endswith(".bias") and wrapper in ("original_module", "modules_to_save") and f"{owner}.bias" in tensors


def _saved_key(key: str, description: dict[str, Any]) -> str | None:
    """Return the state-dict key of a tensor in `modules_to_save`, or of a trained bias, and `None` for other keys.

    PEFT matches any suffix of the name of a module, with or without a dot.
    """
    name = base_key(key)
    if name is None:
        return None
    endings = tuple(description.get("modules_to_save") or [])
    in_full = any(parent.endswith(endings) for parent in parents_of(name))
    is_bias = description.get("bias", "none") != "none" and (name == "bias" or name.endswith(".bias"))
    return name if in_full or is_bias else None


def parents_of(key: str) -> list[str]:
    """Return the names of the modules that contain a state-dict key."""
    parts = key.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def is_edited(folder: Path) -> bool:
    """Return whether the configuration differs from the one that was written with the weights."""
    digest = hashlib.sha256((folder / CONFIG_NAME).read_bytes()).hexdigest()
    return read_metadata(folder).get(_CONFIG_DIGEST, digest) != digest


def read_metadata(folder: Path) -> dict[str, str]:
    path = weights_file(folder)
    if path.name == OLD_WEIGHTS_NAME:
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Return the digest of everything in the file except the digest itself."""
    digest = hashlib.sha256()
    for key, text in sorted(metadata.items()):
        if key != _DIGEST:
            digest.update(f"{key} {text}\n".encode())
    for key, value in sorted(tensors.items()):
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
