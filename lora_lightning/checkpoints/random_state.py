"""Saves and restores random states, for bitwise resuming."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from typing_extensions import override

from lora_lightning.checkpoints.epoch_progress import begin_the_next_epoch, count_the_epoch
from lora_lightning.checkpoints.loader import ResumableLoader
from lora_lightning.checkpoints.loader_state import (
    ValidationLoaders,
    begin_epoch_again,
    generators_of,
    load_pending_states,
    skip_batches,
)
from lora_lightning.checkpoints.resumed_callbacks import (
    keep_best_so_far,
    save_no_step_again,
    warn_of_stochastic_averaging,
)

KEY = "lora_lightning_random_state"
_SEED_OFFSET = 1_000_003


class RandomState(Callback):
    """Saves the state of all random number generators with a checkpoint, and restores it when training resumes.

    This covers PyTorch on the CPU and on the GPU of this process, NumPy and Python, and generators of the training
    loaders, separately for each process of a run. The states are restored before the first batch is loaded, so the
    order of a `DataLoader(shuffle=True)` continues, and so do augmentations. In the middle of an epoch, a loader
    without state of its own loads and skips the batches that were trained on. Validation does not affect random numbers
    in training, so these depend neither on the number of validations nor on the moment when a run stopped. A run
    continues with the correct epoch, also with `max_steps`, and `ModelCheckpoint` continues with its best score, also
    in another folder.

    `LoRAFinetuning` includes this callback. Add it to runs without LoRA.
    """

    def __init__(self) -> None:
        self._to_restore: dict[str, Any] | None = None
        self._must_count = False
        self._is_begun = False
        self._validation_loaders: ValidationLoaders | None = None
        self._after_batch: torch.Tensor | None = None
        self._before_validation: dict[str, Any] | None = None
        self._at_epoch_start: dict[str, Any] = {}

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        own = random_state() | {"generators": generators_of(trainer), "epoch_start": self._at_epoch_start}
        states: list[dict[str, Any] | None] = [own]
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, own)
        checkpoint[KEY] = states

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get(KEY)
        if isinstance(states, list) and len(states) == trainer.world_size:
            self._to_restore = states[trainer.global_rank]
        keep_best_so_far(trainer, checkpoint)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._at_epoch_start = random_state() | {"generators": []}  # the loaders do not exist yet

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trained = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        is_in_mid_epoch = trainer.fit_loop.restarted_mid_epoch and trained < trainer.num_training_batches
        begin_the_next_epoch(trainer)
        for loader in CombinedLoader(trainer.train_dataloader).flattened:
            if isinstance(loader, ResumableLoader):
                loader.most = trainer.num_training_batches
                if not trainer.fit_loop.restarted_mid_epoch:
                    loader.begin_epoch()  # the previous epoch may have been ended early by max_steps
        state, self._to_restore = self._to_restore, None
        self._must_count = state is not None
        if state is None:
            return
        save_no_step_again(trainer)
        warn_of_stochastic_averaging(trainer)
        self._validation_loaders = ValidationLoaders(trainer)
        if load_pending_states(trainer):
            restore_random_state(state)
            return
        start = state.get("epoch_start") or {}
        if is_in_mid_epoch and start:
            self._at_epoch_start = start
            restore_random_state(start)
            skip_batches(trainer, trained, start["generators"])
            restore_random_state(state)
            return
        restore_random_state(state)
        self._at_epoch_start = {key: value for key, value in state.items() if key != "epoch_start"}
        self._is_begun = True
        begin_epoch_again(trainer, state["generators"])

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The iterator of the first epoch, and of one that was resumed, exists already.
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready and not self._is_begun:
            self._at_epoch_start = random_state() | {"generators": generators_of(trainer)}

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._must_count:
            self._must_count = False
            count_the_epoch(trainer)
        self._is_begun = False
        if self._validation_loaders is not None:
            self._validation_loaders.restore()
            self._validation_loaders = None

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._after_batch = torch.get_rng_state()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._before_validation = random_state()
            if self._after_batch is not None:  # the loader of the validation has drawn a seed since then
                self._before_validation["torch"], self._after_batch = self._after_batch, None

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._before_validation is not None:
            restore_random_state(self._before_validation)
            self._before_validation = None


def random_state() -> dict[str, Any]:
    """Return the states of all generators, in types that `torch.load` reads with `weights_only`."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": list(random.getstate()[1]),
        "python_gauss": random.getstate()[2],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore the states that `random_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    random.setstate((3, tuple(state["python"]), state["python_gauss"]))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Make the random numbers in this context a function of the seed of the run.

    The number of earlier draws depends on the strategy (`ddp` seeds again), but adapters must be the same on one device
    and on several. The offset prevents reusing the numbers that initialized the base.
    """
    seed = os.environ.get("PL_GLOBAL_SEED")
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed) + _SEED_OFFSET)
        yield
