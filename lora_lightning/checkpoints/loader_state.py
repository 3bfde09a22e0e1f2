"""Continues with the batches of a data loader that keeps no state itself, such as `DataLoader(shuffle=True)`.

Lightning creates the iterator of a loader before it restores a checkpoint. The order of the samples is then that of the
first epoch. Here the iterator is created again, after the random states were restored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch.utils.data import DataLoader

from lora_lightning.checkpoints.loader import ResumableLoader


def generators_of(trainer: Trainer) -> list[torch.Tensor]:
    """Return the states of the generators that the training loaders have of their own."""
    return [generator.get_state() for generator in _generators(trainer)]


def load_pending_states(trainer: Trainer) -> bool:
    """Load the states of loaders that were created before Lightning knew the states.

    `trainer.estimated_stepping_batches` in `configure_optimizers` creates the loaders early, and Lightning then never
    loads their states.

    Returns:
        Whether there were any.
    """
    loop = trainer.fit_loop
    states, loader = loop._combined_loader_states_to_load, loop._combined_loader
    if not states or loader is None:
        return False
    loader._load_state_dicts(states)
    loop._combined_loader_states_to_load = []
    _begin_again(trainer)
    return True


def begin_epoch_again(trainer: Trainer, generators: list[torch.Tensor]) -> None:
    """Create the iterator of an epoch that has no batch yet, from the random states of now and these generators."""
    if _all_keep_their_state(trainer):
        return
    _restore_generators(trainer, generators)
    _begin_again(trainer)


def skip_batches(trainer: Trainer, count: int, generators: list[torch.Tensor]) -> None:
    """Create the iterator of an epoch from the random states at its start, and skip the batches that were trained on.

    Args:
        trainer: The trainer.
        count: Number of batches that were trained on.
        generators: States of the loaders' own generators at the start of the epoch. It is empty for the first epoch,
            where the iterator that Lightning has created is the right one if a loader has a generator.
    """
    if _all_keep_their_state(trainer):
        return
    if trainer.fit_loop.max_batches == float("inf"):
        rank_zero_warn(
            "The data loader has no length and keeps no state, so this run does not continue with the batch after the "
            "last one. Resume from the end of an epoch, or give the loader state_dict and load_state_dict."
        )
        return
    if generators or not any(True for _ in _generators(trainer)):
        _restore_generators(trainer, generators)
        _begin_again(trainer)
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    assert fetcher.iterator is not None
    for _ in range(count):
        next(fetcher.iterator)


class ValidationLoaders:
    """Keeps the loaders of the validation from drawing random numbers before the first batch of a resumed run.

    Lightning creates their iterators there to count the batches of a validation that it does not repeat, and each
    iterator draws a seed. The loaders get a generator of their own until the first batch.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        loaders = CombinedLoader(trainer.val_dataloaders or []).flattened
        self._loaders = [each for each in loaders if isinstance(each, DataLoader) and each.generator is None]
        for loader in self._loaders:
            loader.generator = torch.Generator()

    def restore(self) -> None:
        """Give the loaders the generator of PyTorch again."""
        for loader in self._loaders:
            loader.generator = None


def _all_keep_their_state(trainer: Trainer) -> bool:
    return all(hasattr(loader, "load_state_dict") for loader in _loaders(trainer))


def _loaders(trainer: Trainer) -> list[Any]:
    loader = trainer.fit_loop._combined_loader
    return [] if loader is None else list(loader.flattened)


def _generators(trainer: Trainer) -> Iterator[torch.Generator]:
    """Yield the generators of the loaders and their samplers, each once."""
    seen: set[int] = set()
    for loader in _loaders(trainer):
        if isinstance(loader, ResumableLoader):  # whose order is a function of the epoch
            continue
        for owner in (loader, getattr(loader, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator) and id(generator) not in seen:
                seen.add(id(generator))
                yield generator


def _restore_generators(trainer: Trainer, states: list[torch.Tensor]) -> None:
    for generator, state in zip(_generators(trainer), states, strict=False):
        generator.set_state(state.cpu())


def _begin_again(trainer: Trainer) -> None:
    progress = trainer.fit_loop.epoch_progress.current
    epoch: int = progress.processed  # type: ignore[attr-defined] # it is a subclass that has it
    for loader in _loaders(trainer):
        _set_sampler_epoch(loader, epoch)  # Lightning does so later, but a loader may draw the order of samples now
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    iter(fetcher)
