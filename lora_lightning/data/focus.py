"""Supports classes in focus, which are over-represented in training batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lora_lightning.data.samplers import ReplaySampler
from lora_lightning.wording import some_of

Name = TypeVar("Name", int, str)


def as_list(names: Name | list[Name] | None) -> list[Name] | None:
    """Return a list with one element for a single name."""
    return names if names is None or isinstance(names, list) else [names]


def check_share(focus_fraction: float) -> None:
    """Raise a `ValueError` unless this is a valid share that leaves space for other classes."""
    if not 0 < focus_fraction < 1:
        raise ValueError(f"focus_fraction={focus_fraction!r}: expected a share above 0 and below 1.")


def check_classes(focus: list[str] | None, class_names: Sequence[str]) -> None:
    """Raise a `ValueError` if one of these classes does not exist, or if they are all classes."""
    if unknown := [name for name in focus or [] if name not in class_names]:
        raise ValueError(f"focus={focus}: {unknown[0]!r} is not one of the classes ({some_of(class_names)}).")
    if focus is not None and not 0 < len(set(focus)) < len(class_names):
        raise ValueError(f"focus={focus}: expected at least one class, and at least one other class to mix in.")


def replay_sampler(
    targets: Tensor,
    classes: list[int],
    batch_size: int,
    focus_fraction: float,
    placement: dict[str, int],
    lengths: Sequence[int] | None = None,
) -> ReplaySampler:
    """Return a sampler of batches with a fixed share of these classes, where the rest is drawn from all others."""
    is_focus = torch.isin(targets, torch.tensor(classes))
    return ReplaySampler(is_focus, batch_size=batch_size, focus_fraction=focus_fraction, lengths=lengths, **placement)
