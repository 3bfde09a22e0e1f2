"""Records the checkpoint that a run started from, and how it ended."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lora_lightning.checkpoints.run_record import STARTED_FROM, RunRecord


class StartedFrom(Callback):
    """Write the record of a run to its log folder.

    `--ckpt_path last` needs the checkpoint that a run started from, and a log folder in place of a checkpoint stands
    for the newest run that finished.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = _local_folder(trainer)
        if folder is not None:
            RunRecord.start(folder, str(trainer.ckpt_path or ""))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = _local_folder(trainer)
        if folder is not None and (folder / STARTED_FROM).is_file():
            best = str(getattr(trainer.checkpoint_callback, "best_model_path", ""))
            RunRecord.finish(folder, trainer.global_step, "" if "://" in best else best)


def _local_folder(trainer: Trainer) -> Path | None:
    """Return the log folder on the first device if it is local. Every device has to call this."""
    folder = trainer.log_dir if trainer.loggers else None
    if folder is None or "://" in folder or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    return Path(folder)
