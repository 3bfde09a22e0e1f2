"""Corrects Lightning's count of epochs for runs that resume at the end of an epoch.

Both functions only change the progress that Lightning 2.6 tracks. They do nothing for later versions.
"""

from __future__ import annotations

from importlib.metadata import version

from lightning.pytorch import Trainer
from lightning.pytorch.loops.loop import _Loop

from lora_lightning.lightning_packages import own_class

_NEEDED = tuple(map(int, version("lightning").split(".")[:2])) < (2, 7)


def begin_the_next_epoch(trainer: Trainer) -> None:
    """Continue after an epoch that was complete when the checkpoint was written. Call this in `on_train_start`.

    With `max_steps`, Lightning treats every checkpoint as one of an incomplete epoch
    (https://github.com/Lightning-AI/pytorch-lightning/pull/12821). It repeats the complete epoch without a batch and
    counts it twice. The data of the next epoch are then skipped, and `max_epochs` is reached too early.
    """
    loop = trainer.fit_loop
    current, total = loop.epoch_progress.current, loop.epoch_progress.total
    finished = current.ready == current.started == current.processed  # type: ignore[attr-defined] # it is a subclass that has it
    if not _NEEDED or not loop.restarting or not finished or loop.restarted_mid_epoch:
        return
    if total.completed < total.processed:  # type: ignore[attr-defined]
        loop.epoch_progress.increment_completed()
    current.completed = current.processed  # type: ignore[attr-defined]
    own_class(loop, _Loop).restarting.fset(loop, False)  # the setter of the loop itself is wrong
    loop.update_restart_stage()


def count_the_epoch(trainer: Trainer) -> None:
    """Count the epoch that starts after a checkpoint at the last batch of an epoch. Call this at its first batch.

    Lightning omits this, so a checkpoint of that epoch would resume with a wrong number of batches. During a batch, the
    number of started epochs exceeds the number of completed ones by one.
    """
    progress = trainer.fit_loop.epoch_progress
    if _NEEDED and progress.current.ready == progress.current.processed:  # type: ignore[attr-defined]
        progress.increment_ready()
        progress.increment_started()
