"""Records the checkpoint that a run started from."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lora_lightning.checkpoints.checkpoints import STARTED_FROM


class StartedFrom(Callback):
    """Write the path of the checkpoint that a run starts from to its log folder, for `--ckpt_path last`."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = trainer.log_dir if trainer.loggers else None
        if folder is not None and "://" not in folder and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / STARTED_FROM).write_text(f"{trainer.ckpt_path or ''}\n")
