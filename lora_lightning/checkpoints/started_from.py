"""Records the checkpoint that a run started from, and how it ended."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lora_lightning.checkpoints.run_record import STARTED_FROM, RunRecord


class StartedFrom(Callback):
    """Write the record of a run to its log folder.

    `--ckpt_path last` needs the checkpoint that a run started from, and a log folder in place of a checkpoint stands
    for the newest run that finished. A run for which nothing is left to train says so.
    """

    def __init__(self) -> None:
        self._trains = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trains = True

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trains = False
        folder = _local_folder(trainer)
        if folder is not None:
            RunRecord.start(folder, str(trainer.ckpt_path or ""))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._trains and (limits := _limits_reached(trainer)):
            rank_zero_info(f"Nothing is left to train: {limits}")
        folder = _local_folder(trainer)
        if folder is not None and (folder / STARTED_FROM).is_file():
            best = str(getattr(trainer.checkpoint_callback, "best_model_path", ""))
            RunRecord.finish(folder, trainer.global_step, "" if "://" in best else best)


def _limits_reached(trainer: Trainer) -> str:
    """Return which limits a finished training has reached and the options that continue it, or an empty string."""
    epochs: int = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined] # a subclass has it
    reached = {}
    for option, done, limit in (
        ("max_steps", trainer.global_step, trainer.max_steps),
        ("max_epochs", epochs, trainer.max_epochs),
    ):
        if limit is not None and 0 < limit <= done:
            reached[f"--trainer.{option}"] = f"{done:,} of {limit:,} {option.removeprefix('max_')}"
    return f"{', '.join(reached.values())}. To continue, raise {' and '.join(reached)}." if reached else ""


def _local_folder(trainer: Trainer) -> Path | None:
    """Return the log folder on the first device if it is local. Every device has to call this."""
    folder = trainer.log_dir if trainer.loggers else None
    if folder is None or "://" in folder or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    return Path(folder)
