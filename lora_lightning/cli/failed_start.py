"""Removes the log folder of a run that failed before its first step."""

from __future__ import annotations

import shutil
import time
from fnmatch import fnmatch
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

_OF_A_START = ("events.out.tfevents.*", "hparams.yaml", "config.yaml", "started_from.txt")
"""Files that a run writes before its first step."""


class FailedStart:
    """Removes the log folder if the run failed before its first step, and if nothing else is in it."""

    def __init__(self) -> None:
        self._created = time.time()

    def clean_up(self, trainer: Trainer, exception: BaseException) -> None:
        """Remove the folder. An interrupted run keeps its files, and a failure to remove them is ignored."""
        if isinstance(exception, KeyboardInterrupt) or trainer.global_step or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                continue
            folder = Path(logger.log_dir)
            if folder.is_dir() and self._is_of_a_start(folder):
                logger.experiment.close()
                shutil.rmtree(folder, ignore_errors=True)
                for parent in list(folder.parents)[:2]:
                    if parent != Path.cwd() and parent.is_dir() and not any(parent.iterdir()):
                        parent.rmdir()

    def _is_of_a_start(self, folder: Path) -> bool:
        """Return whether the folder only has files that the start of this run wrote."""
        files = list(folder.rglob("*"))
        known = all(any(fnmatch(path.name, pattern) for pattern in _OF_A_START) for path in files)
        # Some file systems have whole seconds only.
        return known and all(path.stat().st_mtime >= self._created - 1 for path in files)
