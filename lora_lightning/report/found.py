"""Finds the targets in a batch and the logits in the output of a model, and converts them to a common shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_TARGET_KEYS = ("labels", "label", "targets", "target", "y", "mask")
_LOGIT_KEYS = ("logits", "out", "preds", "pred", "y_hat")
_NO_TARGET = -100
"""Target of a sample that does not count: the default `ignore_index` of PyTorch's losses."""


def find_targets(batch: Any, key: str | int | None = None) -> Tensor | None:
    """Return the targets in `batch`, or `None` if they are not found.

    Args:
        batch: A mapping with one of the usual keys (`labels`, `label`, `targets`, `target`, `y`, `mask`), a sequence whose second element
            contains the targets, or an object with such an attribute.
        key: Key, attribute or position of the targets, if it differs.
    """
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in ((key,) if key is not None else _TARGET_KEYS) if name in batch), None)
    elif isinstance(batch, tuple | list):
        place = 1 if key is None else key
        found = batch[place] if isinstance(place, int) and -len(batch) <= place < len(batch) else None
        if isinstance(found, Mapping):
            found = find_targets(found)
    else:
        names = [str(key)] if key is not None else _TARGET_KEYS
        found = next((getattr(batch, name) for name in names if hasattr(batch, name)), None)
    return found if isinstance(found, Tensor) and found.dim() else None


def align(output: Any, targets: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Return the first logits in `output` that fit `targets`, and the targets, both flattened, or `None` if none fit.

    Args:
        output: Logits, or an object, mapping or sequence with logits. Their shape is (B, C, ...), or (B, ..., C) as in the transformers
            library, or for two classes (B, 1, ...) or (B,).
        targets: Class numbers of shape (B, ...) or (B, 1, ...), or one-hot rows of shape (B, C).

    Returns:
        Logits of shape (N, C), or (N,) for two classes, and targets of shape (N,), int64.
    """
    found = (_aligned(each, targets) for each in tensors_of(output) if each.is_floating_point() and targets is not None)
    return next(filter(None, found), None)


def counted(targets: Tensor, num_classes: int, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Return the mask of the targets to count, and the invalid targets.

    Targets equal to `ignore_index` or -100 are neither counted nor invalid.
    """
    ignored = targets == _NO_TARGET
    if ignore_index is not None:
        ignored |= targets == ignore_index
    valid = (targets >= 0) & (targets < num_classes) & ~ignored
    return valid, targets[~valid & ~ignored]


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in an output, starting with those that are named like logits."""
    if isinstance(output, Tensor):
        yield output
        return
    if isinstance(named := getattr(output, "logits", None), Tensor):
        yield named
    if isinstance(output, Mapping):
        output = [output[key] for key in dict.fromkeys((*_LOGIT_KEYS, *output)) if key in output]
    if isinstance(output, tuple | list):
        yield from (each for each in output if isinstance(each, Tensor))


def _aligned(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
    if targets.dim() == logits.dim() > 1 and targets.shape[1] == 1:
        targets = targets.squeeze(1)
    if targets.is_floating_point() or targets.dtype == torch.bool:
        if targets.dim() == 2 and targets.shape == logits.shape and bool((targets.amax(1) == 1).all()):
            if not bool((targets.sum(1) == 1).all()):
                return None  # several classes per sample
            targets = targets.argmax(1)
        elif not bool((targets == targets.round()).all()):
            return None  # not classes
    targets = targets.long()
    if logits.dim() > 1 and logits.shape[1] == 1:
        logits = logits.squeeze(1)
    if logits.shape == targets.shape and logits.dim() != 2:
        return logits.flatten(), targets.flatten()
    if logits.dim() > 1 and logits.shape[:1] + logits.shape[2:] == targets.shape:
        return logits.movedim(1, -1).flatten(0, -2), targets.flatten()
    if logits.dim() > 1 and logits.shape[:-1] == targets.shape:
        return logits.flatten(0, -2), targets.flatten()
    return None


def described(value: Any) -> str:
    """Return a description of a batch or an output: `{image: (8, 3, 32, 32), label: (8,)}`."""
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {described(each)}" for key, each in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(described(each) for each in value[:5]) + (", ...]" if len(value) > 5 else "]")
    return type(value).__name__
