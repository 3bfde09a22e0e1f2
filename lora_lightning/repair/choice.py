"""Chooses what to repair and how, by validation data alone. Nothing here sees test data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lightning.repair.answers import Answers, Tally
from lora_lightning.report import Confusion

LAMBDAS = tuple(step / 10 for step in range(1, 11))
"""Are the factors of the adapters that are compared; 0 is the base."""
MOST_FALSE_POSITIVES = 1.5
_BIASES = tuple(step / 10 for step in range(1, 61))

Key = TypeVar("Key")


def choose(base: Tally, candidates: Mapping[Key, Tally]) -> Key | None:
    """Return the candidate to keep, `None` for the base.

    The rule: of the candidates with fewer errors on the classes in focus than the base, no more errors on all others, and at
    most 1.5 times its false positives, take the one with the fewest errors on the focus; of several, the one with the fewest
    errors in all, then the first.

    Args:
        base: What the base errs on, on validation data.
        candidates: The same of what could replace it.
    """
    allowed = {
        key: tally
        for key, tally in candidates.items()
        if tally.focus_errors < base.focus_errors
        and tally.other_errors <= base.other_errors
        and tally.false_positives <= MOST_FALSE_POSITIVES * base.false_positives
    }
    return min(allowed, key=lambda key: (allowed[key].focus_errors, allowed[key].errors), default=None)


def classes_in_focus(focus: int | str, validated: Confusion) -> tuple[tuple[int, ...], str]:
    """Return the classes that `focus` means, and why.

    Args:
        focus: A class, several of them (`"4,9"`), `"worst"` for the class of lowest recall, or `"worst-pair"` for the two
            classes that are taken for each other most often.
        validated: The base's confusion on validation data.

    Raises:
        ValueError: If it names a class that does not exist, or all of them.
    """
    names = validated.class_names
    if focus == "worst":
        index = validated.weakest()
        return (index,), f"recall {validated.recall[index]:.1%} on {validated.total:,} validation samples"
    if focus == "worst-pair":
        both = validated.matrix + validated.matrix.T
        first, second = divmod(int(both.triu(1).argmax()), len(names))
        count = int(both[first, second])
        return (first, second), f"taken for each other {count} times on {validated.total:,} validation samples"
    return named_classes(focus, names), "as asked"


def named_classes(focus: int | str, names: tuple[str, ...]) -> tuple[int, ...]:
    """Return the classes of these names, which a comma separates."""
    asked = [word.strip() for word in str(focus).split(",")]
    if unknown := [word for word in asked if word not in names]:
        known = ", ".join(names[:20])
        raise ValueError(
            f"focus={focus!r}: {', '.join(map(repr, unknown))} is no class of {known}; or 'worst', or 'worst-pair'."
        )
    chosen = tuple(dict.fromkeys(names.index(word) for word in asked))
    if len(chosen) == len(names):
        raise ValueError(f"focus={focus!r} leaves no other class to mix in; name fewer.")
    return chosen


def one_bias(validated: Answers, focus: tuple[int, ...]) -> Tensor:
    """Return a bias on the logits of the classes in focus, chosen by `choose`; zero if none is better than the base."""
    biases = {value: _one(value, focus, validated.logits.shape[1]) for value in _BIASES}
    tallies = {value: validated.biased(bias).tally(focus) for value, bias in biases.items()}
    best = choose(validated.tally(focus), tallies)
    return _one(0.0 if best is None else best, focus, validated.logits.shape[1])


def matched_bias(validated: Answers, focus: tuple[int, ...], focus_errors: int) -> Tensor:
    """Return the smallest bias on the logits of the focus that leaves at most this many errors on it, whatever it costs elsewhere."""
    classes = validated.logits.shape[1]
    for value in (0.0, *_BIASES):
        bias = _one(value, focus, classes)
        if validated.biased(bias).tally(focus).focus_errors <= focus_errors:
            return bias
    return bias


def bias_vector(validated: Answers) -> Tensor:
    """Return the bias of every logit that gives the lowest cross-entropy on validation data."""
    bias = torch.zeros(validated.logits.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(validated.logits + bias, validated.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return bias.detach()


def _one(value: float, focus: tuple[int, ...], classes: int) -> Tensor:
    bias = torch.zeros(classes)
    bias[list(focus)] = value
    return bias
