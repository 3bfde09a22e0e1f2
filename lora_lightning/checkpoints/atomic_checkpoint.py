"""Writes checkpoint files atomically."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from typing_extensions import override

from lora_lightning.checkpoints.checkpoints import check_file, explain_damage, paths_are_safe
from lora_lightning.lightning_packages import is_a


def write_atomically(files: CheckpointIO) -> CheckpointIO:
    """Return a CheckpointIO that writes the files of `files` atomically.

    A CheckpointIO that writes in the background is wrapped on the inside, where the file is completed.
    """
    if is_a(files, _WrappingCheckpointIO):
        inner = files.checkpoint_io
        # The setter of the property does not replace an existing one.
        files._checkpoint_io = write_atomically(TorchCheckpointIO() if inner is None else inner)
        files._base_checkpoint_io_configured = True
        return files
    return files if isinstance(files, AtomicCheckpointIO) else AtomicCheckpointIO(files)


class AtomicCheckpointIO(CheckpointIO):
    """Writes a checkpoint to a temporary file in the same folder and renames it. Refuses to read damaged checkpoints.

    If a run is killed while it saves, the previous checkpoint, or none, remains under the final name. Lightning itself
    writes to the temporary folder of the system and copies the file if that is on another disk.

    Args:
        checkpoint_io: The CheckpointIO that reads and writes the files.
    """

    def __init__(self, checkpoint_io: CheckpointIO) -> None:
        super().__init__()
        self.checkpoint_io = checkpoint_io

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if "://" in str(path):
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.unfinished")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove(unfinished)
            unfinished.touch()
            mode = unfinished.stat().st_mode
            unfinished.unlink()  # a CheckpointIO may write a folder
            self.checkpoint_io.save_checkpoint(checkpoint, unfinished, storage_options)
            if unfinished.is_dir():
                _remove(path)  # since a folder that has files is not replaced
            else:
                unfinished.chmod(mode)  # older versions of fsspec make files readable only by their owner
                with unfinished.open("rb") as file:
                    os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                _remove(unfinished)
            raise OSError(
                f"The checkpoint {path} could not be written ({error.strerror or error}). Earlier checkpoints are "
                "intact. Free some space or choose another folder, then resume with --ckpt_path last."
            ) from error

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if "://" not in str(path) and not Path(path).is_dir():
            check_file(Path(path))
        with explain_damage(path), paths_are_safe():
            if weights_only is None and "://" in str(path) and not _all_is_trusted():
                weights_only = True  # by default, Lightning would run code from a remote file
            loaded: dict[str, Any] = self.checkpoint_io.load_checkpoint(path, map_location, weights_only)
        return loaded

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        self.checkpoint_io.remove_checkpoint(path)

    @override
    def teardown(self) -> None:
        self.checkpoint_io.teardown()


def _all_is_trusted() -> bool:
    """Return whether PyTorch is told to read any object from any file."""
    return os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0").lower() in ("1", "y", "yes", "true")


def _remove(path: Path) -> None:
    """Remove a file, or a folder with its content, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
