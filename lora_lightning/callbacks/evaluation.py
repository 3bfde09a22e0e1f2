"""Describes the data of an evaluation: names of classes, processes with different samples, repeated samples, and decoders of texts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lora_lightning.backbone_facts import backbone_facts


def decoder(trainer: Trainer) -> Callable[[Tensor], list[str]] | None:
    """Return a function that decodes token ids, from the tokenizer of the data module or of a part of the model, if any."""
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
    names = () if given is None else tuple(map(str, given))
    if len(names) == number:
        return names
    if names:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        rank_zero_warn(
            f"{len(names)} class names ({shown}) do not fit a model of {number} classes, which are numbered instead. Correct class_names "
            "of the data module or of ConfusionReport."
        )
    return tuple(map(str, range(number)))


def data_parallel_group(trainer: Trainer) -> Any:
    """Return the group of processes with different samples. With tensor parallelism, several processes have the same ones."""
    mesh = getattr(trainer.strategy, "_device_mesh", None)
    return None if mesh is None else mesh["data_parallel"].get_group()


def warn_of_repeated_samples(trainer: Trainer, samples: int, dataset: Any) -> None:
    """Warn if samples were repeated, which Lightning's default sampler does to give each device the same number."""
    if trainer.world_size == 1 or trainer.limit_test_batches != 1.0 or trainer.limit_val_batches != 1.0:
        return
    size = len(dataset) if hasattr(dataset, "__len__") else 0
    if size and samples != size:
        rank_zero_warn(
            f"The confusion matrix counts {samples:,} samples of a data set of {size:,}: the sampler repeats or omits "
            "some. Use lightning.pytorch.overrides.distributed.UnrepeatedDistributedSampler for exact counts."
        )
