"""Records the checkpoint that a run started from."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lora_lightning.checkpoints.checkpoints import STARTED_FROM


class StartedFrom(Callback):
    """Writes the path of the checkpoint that a run starts from to its log folder, for `--ckpt_path last`.

    The file is written whole or not at all: an empty one would make the next run start from the beginning.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = trainer.log_dir if trainer.loggers else None
        if folder is None or "://" in folder or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = Path(folder) / STARTED_FROM
        unfinished = path.with_name(f".{STARTED_FROM}.unfinished")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(f"{trainer.ckpt_path or ''}\n")
            unfinished.replace(path)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            rank_zero_warn(f"{path} could not be written ({error.strerror or error}). The run goes on without it.")
