"""Finds and reads checkpoints."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import Any, Self
from zipfile import BadZipFile

import torch
from lightning.pytorch import LightningModule
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from lora_lightning.checkpoints.run_record import STARTED_FROM, RunRecord
from lora_lightning.wording import some_of

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_KEY = "lora_lightning"
"""Entry of a checkpoint with the configuration of the adapters, and the fingerprint and path of the base."""


def newest_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Return `path` if it is a file, else the checkpoint of the newest run in or below this folder.

    A run of the command line that finished comes before one that was interrupted or still runs. Its checkpoint is the
    best one, whose adapters are in its adapter folder, or the last one if no metric is monitored. Other runs are not
    recorded, and the newest `*.ckpt` is theirs.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; expected a checkpoint, or a log folder that contains one.")
    found = _by_age(path, "*.ckpt")
    if not found:
        raise FileNotFoundError(f"{path} contains no checkpoint (*.ckpt); run fit first, or choose another folder.")
    record = RunRecord.of(found[-1])
    best = None if record is None else record.best
    return best if best is not None and best in found else found[-1]


def _by_age(folder: Path, pattern: str) -> list[Path]:
    """Return the files of this pattern in a folder: those of runs that did not finish, then others, the newest last."""

    def key(file: Path) -> tuple[bool, int, Path]:
        record = RunRecord.of(file)
        return record is None or record.steps is not None, file.stat().st_mtime_ns, file

    # A run that was killed may have left a link to a checkpoint that it had replaced.
    return sorted((file for file in folder.rglob(pattern) if file.exists()), key=key)


def choice_in_words(chosen: Path) -> str:
    """Return a file or folder of a run with its steps, if known, and date: `a.ckpt (600 steps, 2026-11-30 12:01)`."""
    record = RunRecord.of(chosen)
    time = datetime.fromtimestamp(chosen.stat().st_mtime).astimezone().isoformat(" ", "minutes")[:16]
    if record is None:
        return f"{chosen} ({time})"
    return f"{chosen} ({'not finished' if record.steps is None else f'{record.steps:,} steps'}, {time})"


def doubt_about_choice(folder: str | os.PathLike[str], chosen: Path) -> str:
    """Return a sentence if another run in the folder may be meant, else an empty string.

    A newer run did not finish, or an earlier one is ten times as long, since the newest one may have been a trial.
    """
    record = RunRecord.of(chosen)
    if record is None or record.steps is None or not Path(folder).is_dir():
        return ""
    runs = [found for path in Path(folder).rglob(STARTED_FROM) if (found := RunRecord.read(path.parent)) is not None]
    for other in runs:
        if other.steps is None and _is_newer(other.folder, chosen):
            return f"{other.folder} is newer, but did not finish. To use it, give its path."
        if other.steps is not None and other.steps >= 10 * max(record.steps, 1):
            return f"{other.folder} has {other.steps:,} steps. To use it, give its path."
    return ""


def _is_newer(folder: Path, than: Path) -> bool:
    return any(file.stat().st_mtime_ns > than.stat().st_mtime_ns for file in folder.rglob("*.ckpt"))


def newest_adapter(path: str | os.PathLike[str]) -> Path:
    """Return `path` if it is an adapter folder, else the newest adapter folder below.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(path)
    if (path / ADAPTER_CONFIG).is_file():
        return path
    found = _by_age(path, ADAPTER_CONFIG)
    if not found:
        raise FileNotFoundError(
            f"{path} is not an adapter folder and contains none ({ADAPTER_CONFIG}); expected the folder that fit "
            "wrote, a log folder, or 'none' for the base."
        )
    return found[-1].parent


def last_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint to resume the last run in `folder`: the newest one of the newest `version_N`.

    If that run was itself resumed and stopped before it saved a checkpoint, this is the checkpoint that it started
    from. Returns `None` if there is no checkpoint.
    """
    versions = sorted(
        (path for path in folder.glob("version_*") if path.name.removeprefix("version_").isdecimal()),
        key=lambda path: int(path.name.removeprefix("version_")),
    )
    for version in reversed(versions):
        found = [path for path in version.rglob("*.ckpt") if path.exists() and not path.name.startswith(".")]
        if found:
            return max(found, key=lambda file: (file.stat().st_mtime_ns, file))
        if (record := RunRecord.read(version)) is not None:
            return Path(record.started_from) if record.started_from and Path(record.started_from).is_file() else None
    return None


def read_checkpoint(path: Path, weights_only: bool | None = True) -> dict[str, Any]:
    """Read a Lightning checkpoint on the CPU.

    Args:
        path: The file.
        weights_only: Whether to refuse objects other than tensors and plain values, since reading others may run code.
            `None` leaves this to PyTorch, which refuses them unless the environment variable
            `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD` is set.

    Raises:
        ValueError: If the file is damaged, or not a Lightning checkpoint.
    """
    check_file(path)
    with explain_damage(path), paths_are_safe():
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"{path} is not a Lightning checkpoint: it has no 'state_dict'. Choose another one.")
    return checkpoint


def check_file(path: Path) -> None:
    """Verify the checksums of a checkpoint, which `torch.load` ignores.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"The checkpoint {path} does not exist.")
    with explain_damage(path):
        if not zipfile.is_zipfile(path):
            raise ValueError("not an archive, as torch.save writes it")
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("its entries are larger than the file")
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
            for entry in archive.infolist():
                # zipfile accepts such entries, and PyTorch would return uninitialized memory for them.
                plain = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
                if not plain or entry.external_attr or entry.is_dir():
                    raise ValueError(f"{entry.filename} is not as torch.save writes it")


@contextmanager
def paths_are_safe() -> Iterator[None]:
    """Allow `torch.load` to read paths of `pathlib` with `weights_only` in this context.

    Hyper-parameters often are paths.
    """
    with torch.serialization.safe_globals([PosixPath, PurePosixPath, PureWindowsPath, WindowsPath]):
        yield


@contextmanager
def explain_damage(path: str | os.PathLike[str]) -> Iterator[None]:
    """Convert the errors of a damaged checkpoint to one clear message."""
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError, torch.OutOfMemoryError):
        raise
    except (
        OSError,  # such as an invalid position in the file
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        BadZipFile,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        NotImplementedError,
        OverflowError,
        zlib.error,
    ) as error:
        if kind := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} refers to {kind[1]}, which is not read with weights_only=True, as reading it may run code. If "
                "you trust the file, pass weights_only=False to fit, test or LoRAFinetuning, or set the environment "
                "variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1; or save plain numbers, strings and paths as "
                "hyper-parameters."
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason}). Choose another one.") from None


def load_base(pl_module: LightningModule, path: Path, weights_only: bool | None = None) -> None:
    """Load a full checkpoint, or a bare state dict, into the model strictly.

    Args:
        pl_module: The model.
        path: The file.
        weights_only: As in `read_checkpoint`.

    Raises:
        ValueError: If the file is damaged, contains adapters, or does not fit. The model is then unchanged.
    """
    checkpoint = _read_base(path, weights_only)
    if ADAPTER_KEY in checkpoint:
        base = checkpoint[ADAPTER_KEY].get("base_path")
        raise ValueError(
            f"{path} contains adapters instead of a base model. Set base_checkpoint to the checkpoint that they were "
            f"trained on{f' ({base})' if base else ''}, and pass these adapters as ckpt_path."
        )
    saved: dict[str, Any] = checkpoint["state_dict"]
    if wrong := misfits(saved, pl_module.state_dict()):
        raise ValueError(
            f"{path} does not fit this {type(pl_module).__name__}: {wrong}. Configure the model as in its training, or "
            "choose another base_checkpoint."
        )
    pl_module.load_state_dict(saved)


def adapters_in(path: Path) -> dict[str, Any] | None:
    """Return the entry `ADAPTER_KEY` of a checkpoint, or `None` if it is not one of adapters.

    Objects of unknown classes are neither refused nor made, as in `load_base`.
    """
    found: dict[str, Any] | None = _read_base(path, None).get(ADAPTER_KEY)
    return found


class _Unread:
    """Stands for an object of a class that is not read from a checkpoint."""

    def __new__(cls, *arguments: object, **keywords: object) -> Self:
        return super().__new__(cls)

    def __init__(self, *arguments: object, **keywords: object) -> None:
        """Ignore the arguments of the class."""

    def __setstate__(self, state: object) -> None:
        """Ignore the state of the object."""


def _read_base(path: Path, weights_only: bool | None) -> dict[str, Any]:
    """Read a checkpoint, or a file that holds a state dict alone.

    Unless `weights_only` says otherwise, objects of unknown classes are not made: an empty one stands for each, so no
    code of the file runs. Only tensors are needed.
    """
    check_file(path)
    with explain_damage(path), paths_are_safe():
        unknown = get_unsafe_globals_in_checkpoint(path) if weights_only is None else []
        try:
            with safe_globals([(_Unread, name) for name in unknown]):
                found = torch.load(path, map_location="cpu", weights_only=weights_only)
        except pickle.UnpicklingError:  # PyTorch takes no other meaning for some names, and says here for which
            found = torch.load(path, map_location="cpu", weights_only=weights_only)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        return found
    if isinstance(found, dict) and found and all(isinstance(value, torch.Tensor) for value in found.values()):
        return {"state_dict": found}
    raise ValueError(
        f"{path} holds neither a Lightning checkpoint nor a state dict: it has no 'state_dict', and is not a mapping "
        "of names to tensors. Choose another one."
    )


def misfits(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Return a description of the unexpected names and shapes in a state dict, which is empty if there are none."""
    shapes = {key: tuple(getattr(value, "shape", ())) for key, value in found.items()}
    wanted = {key: tuple(getattr(value, "shape", ())) for key, value in expected.items()}
    wrong = [key for key in {**wanted, **shapes} if shapes.get(key) != wanted.get(key)]
    listed = [f"{key} is {shapes.get(key, 'missing')}, expected {wanted.get(key, 'none')}" for key in wrong[:5]]
    return "; ".join(listed + ([f"and {len(wrong) - 5} more"] if len(wrong) > 5 else []))


def holds_adapters_alone(description: Mapping[str, Any]) -> str:
    """Return the error message for loading a checkpoint of adapters into a plain model.

    Args:
        description: The entry `ADAPTER_KEY` of the checkpoint.
    """
    base = description.get("base_path") or "the base"
    return (
        f"This checkpoint contains the adapters of {some_of(description['adapters'])}, but not the network. Create the "
        f"model, load {base} into it, and pass the checkpoint as ckpt_path to a trainer with the LoRAFinetuning of the "
        "training; or call lora_lightning.load_adapter(model.backbone, '<log folder>/adapter'); or create a plain "
        "checkpoint with `lora-lightning merge`."
    )
