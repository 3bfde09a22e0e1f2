"""Defines `find_learning_rate`, a short sweep over learning rates."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, isfinite

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler

from lora_lightning.checkpoints import NotFiniteError
from lora_lightning.checkpoints.random_state import random_state, restore_random_state
from lora_lightning.find_lr.factor import LearningRateFactor
from lora_lightning.find_lr.found import FoundRate, Trial
from lora_lightning.find_lr.watch import LOSS_OF_STEPS, NO_VALIDATION, Length, Watch, is_left_out

RATES = (1, 3, 10, 30)
SHARE = 0.1
LEAST_STEPS = 50
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric", "transformers")


def find_learning_rate(
    trainer: Trainer,
    module: LightningModule,
    datamodule: LightningDataModule | None = None,
    rates: Sequence[float] = RATES,
    steps: int | None = None,
    monitor: str | None = None,
    apply: bool = False,
) -> FoundRate:
    """Train copies of a module for a few steps at several learning rates, and compare their validation losses.

    Each rate starts from the same weights with the same batches and random numbers, which are those that `trainer.fit`
    would begin with. The copies have all callbacks of the trainer, such as `LoRAFinetuning`, except for Lightning's and
    ours that write files, show progress or stop a run. Loggers are replaced. Trainer, module, data and random states
    are afterwards bitwise as before. This needs the memory for one further copy of module and data.

    The answer is the rate below the one with the lowest loss, unless the runs have at least half of the steps of `fit`:
    in short runs, higher rates are stable than in long ones.

    Learning rates are multiplied in each step of each optimizer, so any schedule is followed. A schedule that asks the
    trainer for the length of the run, such as `OneCycle`, is run through in each short run. Others show their start.

    Lightning's `LearningRateFinder` is not used. It raises the rate in one run of 100 steps and chooses where the
    training loss falls fastest. It works with one optimizer, replaces the schedule, and drops all callbacks for its
    run. One run over all rates is cheaper than one run for each.

    Args:
        trainer: A trainer on one device that has not trained yet.
        module: Any module with `configure_optimizers` and validation.
        datamodule: Its data. `None` uses the loaders of the module. `LightningDataModule.from_datasets` makes one of
            data sets.
        rates: Factors of the configured learning rates.
        steps: Number of steps for each rate. The default is a tenth of the steps of `fit`, but at least 50, or
            all of them if there are fewer.
        monitor: Name of a logged validation metric, lower is better. By default the logged validation loss, or else the
            mean loss of the validation steps.
        apply: Whether to add `LearningRateFactor` with the answer to the callbacks of the trainer. This is the only
            change.

    Returns:
        The answer with its margin, its warnings, a table and a figure.

    Raises:
        ValueError: If an argument is out of range, the trainer has several devices or has trained already, the length
            of `fit` is not known, or there is no validation loss.
        TypeError: If the module or the data cannot be copied.

    Example::

        found = find_learning_rate(trainer, model, data)
        print(found.answer())
    """
    factors = sorted(set(rates))
    if not factors or not all(isfinite(factor) and factor > 0 for factor in factors):
        raise ValueError(f"rates={list(rates)!r}: expected positive factors of the configured learning rate.")
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps}: expected at least 1.")
    if trainer.world_size > 1:
        raise ValueError(f"The trainer has {trainer.world_size} devices. Find the rate with Trainer(devices=1).")
    if trainer.global_step:
        raise ValueError(f"The trainer has trained for {trainer.global_step} steps. Pass a new one.")
    before = random_state()
    runs = _Runs(trainer, module, datamodule, monitor)
    try:
        with _quiet():
            length = runs.length()
            steps = steps or _default_steps(length)
            trials = []
            for factor in factors:
                restore_random_state(before)
                trials.append(runs.trial(factor, steps))
                gc.collect()  # trainer, module and data refer to each other
    finally:
        restore_random_state(before)
    found = FoundRate(tuple(trials), steps, runs.monitor or LOSS_OF_STEPS, length)
    if apply and not found.best.diverged:
        trainer.callbacks.append(LearningRateFactor(found.factor))  # type: ignore[attr-defined] # set from elsewhere
    return found


@dataclass
class _Runs:
    """Runs `fit` with copies."""

    trainer: Trainer
    module: LightningModule
    datamodule: LightningDataModule | None
    monitor: str | None

    def length(self) -> float:
        """Return the number of steps of the configured `fit`."""
        length = Length()
        trainer, module, datamodule = self._copies(length)
        trainer.fit(module, datamodule=datamodule)
        return length.steps

    def trial(self, factor: float, steps: int) -> Trial:
        """Train a copy for a few steps, and validate it."""
        start = time.perf_counter()
        scaled, watch = LearningRateFactor(factor), Watch(steps, self.monitor, self.module.parameters())
        trainer, module, datamodule = self._copies(watch, scaled)
        trainer.fit_loop.epoch_loop.max_steps = steps
        try:
            trainer.fit(module, datamodule=datamodule)
            if watch.loss is None and not watch.diverged:
                trainer.validate(module, datamodule=datamodule, verbose=False)
        except NotFiniteError:
            watch.diverged = True
        if not scaled.steps and not watch.diverged:
            raise ValueError("No optimizer made a step, or none calls the hooks of torch.optim.Optimizer.")
        if watch.loss is None and not watch.diverged:
            raise ValueError(NO_VALIDATION)
        self.monitor = self.monitor or watch.monitor
        loss = inf if watch.diverged or watch.loss is None or not isfinite(watch.loss) else watch.loss
        return Trial(factor, watch.rate * factor, loss, tuple(watch.curve), time.perf_counter() - start)

    def _copies(self, *first: Callback) -> tuple[Trainer, LightningModule, LightningDataModule | None]:
        """Return copies of trainer, module and data, with these callbacks and without those that write or stop."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined] # Trainer sets it from elsewhere
        # Whatever is in this dictionary is not copied but replaced.
        replaced: dict[int, object] = {id(self.trainer.profiler): PassThroughProfiler()}  # type: ignore[attr-defined]
        replaced |= {id(each): DummyLogger() for each in self.trainer.loggers}
        replaced |= {id(each): _LEFT_OUT for each in callbacks if is_left_out(each)}
        try:
            trainer, module, datamodule = copy.deepcopy((self.trainer, self.module, self.datamodule), replaced)
        except (TypeError, RuntimeError, AttributeError, copy.Error, pickle.PickleError) as error:
            raise TypeError(
                f"Learning rates are tried on copies, but module, data or callbacks cannot be copied: {error}"
            ) from error
        kept = [each for each in trainer.callbacks if each is not _LEFT_OUT]  # type: ignore[attr-defined]
        trainer.callbacks = [*first, *kept]  # type: ignore[attr-defined]
        trainer.num_sanity_val_steps = 0
        trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None
        return trainer, module, datamodule


_LEFT_OUT = Callback()


def _default_steps(configured: float) -> int:
    if not isfinite(configured):
        raise ValueError("The length of fit is not known: pass steps, or set max_epochs or max_steps of the Trainer.")
    return int(min(max(SHARE * configured, LEAST_STEPS), configured))


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what each of several runs would say again."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
