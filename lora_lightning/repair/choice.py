"""Selects the classes and the adapters of a repair on validation data. Nothing in this file uses test data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lora_lightning.evaluation import Confusion
from lora_lightning.repair.predictions import Predictions, Tally

LAMBDAS = tuple(step / 10 for step in range(1, 11))
"""The compared scales λ of the adapters. The base has the scale 0."""
_BIASES = tuple(step / 10 for step in range(1, 61))

Key = TypeVar("Key")


@dataclass(frozen=True)
class Setting:
    """Describes a candidate: adapters with a rank, a share of the focus in training, and a scale.

    Args:
        rank: Rank of the adapters.
        share: Share of the focus.
        scale: Scale λ.
    """

    rank: int
    share: float
    scale: float

    def in_words(self) -> str:
        """Return the rank, the share and the scale: `rank 8, share 15%, scale 1`."""
        return f"rank {self.rank}, share {self.share:.0%}, scale {self.scale:g}"


def choose(base: Tally, candidates: Mapping[Key, Tally]) -> Key | None:
    """Return the candidate to keep, or `None` for the base.

    A candidate qualifies if it has fewer errors on the classes in focus than the base, no more errors on all others,
    and if its false positives do not rise by more than the errors on the focus fall. Among these, the one with the
    fewest errors on the focus is selected. Ties are resolved by the fewest errors in total, then by the order.

    Args:
        base: Errors of the base on validation data.
        candidates: Errors of the candidates on validation data.
    """
    allowed = {
        key: tally
        for key, tally in candidates.items()
        if tally.focus_errors < base.focus_errors
        and tally.other_errors <= base.other_errors
        and tally.false_positives - base.false_positives <= base.focus_errors - tally.focus_errors
    }
    return min(allowed, key=lambda key: (allowed[key].focus_errors, allowed[key].errors), default=None)


def classes_in_focus(focus: int | str, validated: Confusion) -> tuple[tuple[int, ...], str]:
    """Return the classes for `focus`, and the reason.

    Args:
        focus: A class, several classes (`"4,9"`), `"worst"` for the class with the lowest recall, or `"worst-pair"` for
            the two classes that are confused most often.
        validated: Confusion matrix of the base on validation data.

    Raises:
        ValueError: If a class does not exist, or if all classes are named.
    """
    names = validated.class_names
    if focus == "worst":
        index = validated.weakest()
        return (index,), f"recall {validated.recall[index]:.1%} on {validated.total:,} validation samples"
    if focus == "worst-pair":
        both = Counter[tuple[int, int]]()
        for (target, taken), times in validated.mistakes().items():
            both[min(target, taken), max(target, taken)] += times
        count, (first, second) = min(((-times, pair) for pair, times in both.items()), default=(0, (0, 1)))
        return (first, second), f"taken for each other {-count} times on {validated.total:,} validation samples"
    return named_classes(focus, names), "as asked"


def named_classes(focus: int | str, names: tuple[str, ...]) -> tuple[int, ...]:
    """Return the classes for names that are separated by commas."""
    asked = [word.strip() for word in str(focus).split(",")]
    if unknown := [word for word in asked if word not in names]:
        known = ", ".join(names[:20])
        raise ValueError(
            f"focus={focus!r}: {', '.join(map(repr, unknown))} is not a class: expected {known}, worst or worst-pair."
        )
    chosen = tuple(dict.fromkeys(names.index(word) for word in asked))
    if len(chosen) == len(names):
        raise ValueError(f"focus={focus!r} leaves no other class to mix in; name fewer.")
    return chosen


def one_bias(validated: Predictions, focus: tuple[int, ...]) -> Tensor:
    """Return a bias for the logits of the focus, selected by `choose`, or zero if none is better than the base."""
    classes = validated.logits.shape[1]
    biases = {value: _bias(value, focus, classes) for value in _BIASES}
    tallies = {value: validated.biased(bias).tally(focus) for value, bias in biases.items()}
    best = choose(validated.tally(focus), tallies)
    return _bias(0.0 if best is None else best, focus, classes)


def matched_bias(validated: Predictions, focus: tuple[int, ...], focus_errors: int) -> Tensor:
    """Return the smallest bias for the logits of the focus with at most this many errors on the focus.

    Other errors are ignored.
    """
    classes = validated.logits.shape[1]
    for value in (0.0, *_BIASES):
        bias = _bias(value, focus, classes)
        if validated.biased(bias).tally(focus).focus_errors <= focus_errors:
            return bias
    return bias


def _bias(value: float, focus: tuple[int, ...], classes: int) -> Tensor:
    bias = torch.zeros(classes)
    bias[list(focus)] = value
    return bias
