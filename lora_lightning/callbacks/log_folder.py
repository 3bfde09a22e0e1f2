"""Finds the folder for the files of a run."""

from __future__ import annotations

from lightning.pytorch import Trainer


def log_folder(trainer: Trainer) -> str | None:
    """Return the folder for the files of the run, if any. Every device has to call this."""
    folder = trainer.log_dir if trainer.loggers else None
    return None if trainer.fast_dev_run else folder  # type: ignore[attr-defined] # Trainer sets it from elsewhere
