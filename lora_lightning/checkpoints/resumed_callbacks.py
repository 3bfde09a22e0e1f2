"""Supports Lightning's own callbacks in runs that resume: `ModelCheckpoint` and `StochasticWeightAveraging`."""

from __future__ import annotations

from typing import Any

import fsspec
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn

from lora_lightning.lightning_packages import is_a


def keep_best_so_far(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let `ModelCheckpoint` keep its best checkpoints and their scores.

    Call this in `on_load_checkpoint`, in all processes. If the resumed run has another `dirpath`, `ModelCheckpoint`
    would only keep the path, and replace it by that of its next checkpoint
    (https://github.com/Lightning-AI/pytorch-lightning/pull/12045). It removes no file outside its `dirpath`. Nothing is
    changed if a checkpoint no longer exists.
    """
    for files in trainer.checkpoint_callbacks:
        state = checkpoint.get("callbacks", {}).get(files.state_key)
        if not is_a(files, ModelCheckpoint) or not state or not state.get("best_k_models"):
            continue
        if trainer.strategy.broadcast(all(map(_exists, state["best_k_models"]))):
            state["dirpath"] = files.dirpath


def save_no_step_again(trainer: Trainer) -> None:
    """Keep `ModelCheckpoint(every_n_train_steps=...)` from saving the step that a run resumes from once more.

    It forgets which step it has saved last. With accumulated gradients, it would save this step after the next batch,
    in the middle of an accumulation, from which no run continues exactly
    (https://github.com/Lightning-AI/pytorch-lightning/issues/17903). Call this in `on_train_start` of a run that
    resumes.
    """
    for files in trainer.checkpoint_callbacks:
        if is_a(files, ModelCheckpoint) and files._every_n_train_steps:
            files._last_global_step_saved = trainer.global_step


def warn_of_stochastic_averaging(trainer: Trainer) -> None:
    """Warn if `StochasticWeightAveraging` cannot continue exactly. Call this in `on_train_start` of a run that resumes.

    Unless a run resumes from the end of an epoch, Lightning does not call `on_train_epoch_start` for its first epoch.
    There, the callback sets the learning rate and adds to the average.
    """
    is_called = not trainer.fit_loop.restarted_mid_epoch
    for callback in trainer.callbacks:  # type: ignore[attr-defined] # Trainer sets it from elsewhere
        if is_a(callback, StochasticWeightAveraging) and not is_called and trainer.current_epoch >= callback.swa_start:
            rank_zero_warn(
                "StochasticWeightAveraging does not continue exactly from a checkpoint that was written during an "
                "epoch: in Lightning, it misses the start of this epoch, so the learning rate and the average differ "
                "from those of a run that was not stopped. Resume from a checkpoint that was written at the end of an "
                "epoch, as ModelCheckpoint does by default."
            )


def _exists(path: str) -> bool:
    filesystem, name = fsspec.core.url_to_fs(path)
    return bool(filesystem.exists(name))
