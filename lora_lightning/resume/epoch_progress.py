"""Two repairs of Lightning's count of epochs, without which a run that resumes at an epoch's end is not the run that it was.

Both touch what Lightning 2.6 keeps of its progress, and nothing else; a later version is left alone.
"""

from __future__ import annotations

from importlib.metadata import version

from lightning.pytorch import Trainer
from lightning.pytorch.loops.loop import _Loop

_NEEDED = tuple(map(int, version("lightning").split(".")[:2])) < (2, 7)


def begin_the_next_epoch(trainer: Trainer) -> None:
    """Go on after an epoch that was finished when the checkpoint was written; to be called in `on_train_start`.

    With `max_steps`, Lightning takes every checkpoint for one of an unfinished epoch
    (https://github.com/Lightning-AI/pytorch-lightning/pull/12821): it runs the finished one again, without a batch, and counts
    it twice. The next epoch's data are then left out, and `max_epochs` is reached too early.
    """
    loop = trainer.fit_loop
    current, total = loop.epoch_progress.current, loop.epoch_progress.total
    finished = current.ready == current.started == current.processed  # type: ignore[attr-defined] # it is a subclass that has it
    if not _NEEDED or not loop.restarting or not finished or loop.restarted_mid_epoch:
        return
    if total.completed < total.processed:  # type: ignore[attr-defined]
        loop.epoch_progress.increment_completed()
    current.completed = current.processed  # type: ignore[attr-defined]
    _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined] # the loop's own setter is what is wrong
    loop.update_restart_stage()


def count_the_epoch(trainer: Trainer) -> None:
    """Count the epoch that began after a checkpoint of an epoch's last batch; to be called when its first batch starts.

    Lightning forgets it, so that a checkpoint of that epoch would be resumed with a wrong number of batches. While a batch is
    trained, one more epoch has begun than ended.
    """
    progress = trainer.fit_loop.epoch_progress
    if _NEEDED and progress.current.ready == progress.current.processed:  # type: ignore[attr-defined]
        progress.increment_ready()
        progress.increment_started()
