"""Describes the data of an evaluation: names of classes, indices of samples, processes, and decoders of texts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from lora_lightning.backbone_facts import backbone_facts
from lora_lightning.wording import one_line

_SAMPLERS_IN_ORDER = ("DistributedSampler", "UnrepeatedDistributedSampler", "UnrepeatedSampler")


def decoder(trainer: Trainer) -> Callable[[Tensor], list[str]] | None:
    """Return a function that decodes token ids, if the data module or a part of the model has a tokenizer."""
    for holder in (getattr(trainer, "datamodule", None), *trainer.lightning_module.modules()):
        facts = backbone_facts(holder)
        # A property is not evaluated, since it may need more than there is in a test.
        tokenizer = inspect.getattr_static(holder, "tokenizer", None) if facts is None else facts.tokenizer
        if tokenizer is not None and hasattr(tokenizer, "batch_decode"):
            return partial(tokenizer.batch_decode, skip_special_tokens=True)
    return None


def names_of_classes(given: Any, number: int) -> tuple[str, ...]:
    """Return the names of `number` classes, or numbers and a warning if `given` has another number of names.

    Args:
        given: Names in the order of the classes, or `None` for numbers.
        number: Number of classes of the model.
    """
    # A name may contain half of a surrogate pair, which no file can.
    names = () if given is None else tuple(str(name).encode(errors="replace").decode() for name in given)
    if len(names) == number:
        return names
    if names:
        shown = ", ".join(one_line(name, 40) for name in names[:5]) + (", ..." if len(names) > 5 else "")
        rank_zero_warn(
            f"{len(names)} class names ({shown}) do not fit a model of {number} classes, which are numbered "
            "instead. Correct class_names of the data module or of ConfusionReport."
        )
    return tuple(map(str, range(number)))


def data_parallel_group(trainer: Trainer) -> Any:
    """Return the group of processes with different samples, since tensor parallelism gives several the same."""
    mesh = getattr(trainer.strategy, "_device_mesh", None)
    return None if mesh is None else mesh["data_parallel"].get_group()


def warn_of_repeated_samples(trainer: Trainer, samples: int, dataset: Any, are_repeated: bool) -> None:
    """Warn if samples were counted more than once.

    Lightning's default sampler repeats samples to give each device the same number. An iterable data set that does not
    split itself gives all of its samples to each device.

    Args:
        trainer: The trainer.
        samples: Number of counted samples of all devices.
        dataset: The data set.
        are_repeated: Whether two devices have counted the same samples.
    """
    if trainer.world_size == 1:
        return
    if isinstance(dataset, IterableDataset):
        if are_repeated:
            rank_zero_warn(
                f"The report counts each sample once per process, {samples:,} in total: each process reads the whole "
                f"of {type(dataset).__name__}, an iterable data set. Yield every n-th sample in each of n processes "
                "for exact counts."
            )
        return
    if trainer.limit_test_batches != 1.0 or trainer.limit_val_batches != 1.0:
        return
    size = len(dataset) if hasattr(dataset, "__len__") else 0
    if size and samples != size:
        rank_zero_warn(
            f"The report counts {samples:,} samples of a data set of {size:,}: the sampler repeats or omits "
            "some. Use lightning.pytorch.overrides.distributed.UnrepeatedDistributedSampler for exact counts."
        )


def sample_indices(loader: Any, first: int, size: int, world_size: int) -> list[int] | None:
    """Return the indices in the data set of the samples of a batch, or `None` if the order of the loader is not known.

    It is known for samplers that go through the data set in order, on any number of devices.

    Args:
        loader: The data loader.
        first: Number of samples of this loader before the batch, on this device.
        size: Number of samples in the batch.
        world_size: Number of devices with different samples.
    """
    positions = range(first, first + size)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return list(positions) if world_size == 1 and getattr(loader, "num_workers", 0) < 2 else None
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if isinstance(sampler, SequentialSampler):
        return list(positions) if world_size == 1 else None
    is_in_order = type(sampler).__name__ == "UnrepeatedSampler" or not getattr(sampler, "shuffle", True)
    if type(sampler).__name__ in _SAMPLERS_IN_ORDER and is_in_order and loader.batch_sampler is not None:
        assert isinstance(sampler, DistributedSampler)
        length = len(loader.dataset)  # type: ignore[arg-type]
        return [(sampler.rank + sampler.num_replicas * position) % length for position in positions]
    return None


def first_time(loader: Any, first: int, size: int) -> list[bool] | None:
    """Return which samples of a batch are not repeated, or `None` if all are new or it is not known.

    `DistributedSampler` goes through the data set in order and starts again, so that all devices have the same number
    of samples.

    Args:
        loader: The data loader.
        first: Number of samples of this loader before the batch, on this device.
        size: Number of samples in the batch.
    """
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if type(sampler).__name__ != "DistributedSampler" or getattr(sampler, "shuffle", True):
        return None
    assert isinstance(sampler, DistributedSampler)
    length = len(loader.dataset)
    found = [sampler.rank + sampler.num_replicas * place < length for place in range(first, first + size)]
    return None if all(found) else found
