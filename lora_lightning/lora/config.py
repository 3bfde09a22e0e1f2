"""What to adapt, and how: `LoRAConfig`, and the rules by which it selects layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

T = TypeVar("T", bound=float)
Initialisation = Literal["kaiming", "gaussian"]


@dataclass(frozen=True)
class LoRAConfig:
    """What to adapt, and how.

    An adapted layer computes `y = W x + b + s B A x` with `A` of shape (rank, in), `B` of shape (out, rank) and the
    scale `s = alpha / rank` (LoRA, https://arxiv.org/abs/2106.09685, section 4.1). `B` starts at zero, so a freshly
    adapted model answers exactly as its base.

    Args:
        rank: Rank r of the update B A, at least 1 and at most min(in, out) of every layer it is given to.
        alpha: Numerator of the scale; `None` means `rank`, that is, a scale of 1.
        dropout: Probability with which an element of the adapter's input (not of the base's) is zeroed in training.
        targets: Which layers: `"all"` the supported ones; a list of names, each matching a layer's whole dotted name
            or the end of it after a dot (`"linear1"` matches `"backbone.linear1"`); or a string, a regular expression
            that has to match the whole dotted name.
        exclude: Layers to leave out of `targets`, written the same way (a list or a regular expression).
        rank_pattern: Ranks that differ from `rank`. A key is a regular expression that matches a layer's dotted name,
            or the end of it after a dot; the first key that matches counts.
        alpha_pattern: Alphas that differ from `alpha`, written like `rank_pattern`.
        init: Distribution of A: `"kaiming"` uniform (the default of the authors' code and of PEFT), or `"gaussian"`
            (the paper's text) with standard deviation 1 / rank.
        rslora: Scale by alpha / sqrt(rank) instead (rsLoRA, https://arxiv.org/abs/2312.03732, equation 5).

    Raises:
        ValueError: If a value is out of its range; the message names it.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | list[str] = "all"
    exclude: str | list[str] = field(default_factory=list)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init: Initialisation = "kaiming"
    rslora: bool = False

    def __post_init__(self) -> None:
        for key, rank in {"rank": self.rank, **_labelled("rank_pattern", self.rank_pattern)}.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"{key}={rank!r}: a LoRA rank is a whole number of at least 1, for example rank=8.")
        alphas = {} if self.alpha is None else {"alpha": self.alpha}
        for key, alpha in {**alphas, **_labelled("alpha_pattern", self.alpha_pattern)}.items():
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
                raise ValueError(
                    f"{key}={alpha!r}: alpha is a finite number above 0; leave it out to have alpha = rank."
                )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: expected a probability of at least 0 and below 1.")
        if self.init not in ("kaiming", "gaussian"):
            raise ValueError(f"init={self.init!r}: expected 'kaiming' or 'gaussian'.")
        if not self.targets:
            raise ValueError(
                f"targets={self.targets!r} selects nothing: expected 'all', a list of layer names, or a regular "
                "expression."
            )
        for key, pattern in (("targets", self.targets), ("exclude", self.exclude)):
            if isinstance(pattern, str):
                _check_expression(key, pattern)
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, key):
                _check_expression(key, pattern)

    def selects(self, name: str) -> bool:
        """Whether a supported layer of this dotted name gets an adapter."""
        return (self.targets == "all" or _matches(self.targets, name)) and not _matches(self.exclude, name)

    def rank_of(self, name: str) -> int:
        """The rank of the layer with this dotted name."""
        return _first_match(self.rank_pattern, name, self.rank)

    def alpha_of(self, name: str) -> float:
        """The alpha of the layer with this dotted name; without any alpha given, its rank."""
        default = self.rank_of(name) if self.alpha is None else self.alpha
        return _first_match(self.alpha_pattern, name, default)

    def scaling_of(self, name: str) -> float:
        """The scale s of the layer with this dotted name: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (rank**0.5 if self.rslora else rank)

    def unmatched_targets(self, names: Iterable[str]) -> list[str]:
        """The entries of `targets` (and of the patterns) that match none of these layer names."""
        names = list(names)
        targets = [self.targets] if isinstance(self.targets, str) else self.targets
        unmatched = [t for t in targets if t != "all" and not any(_matches_entry(self.targets, t, n) for n in names)]
        selected = [name for name in names if self.selects(name)]
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            if not any(_pattern_matches(pattern, name) for name in selected):
                unmatched.append(pattern)
        return unmatched


def _labelled(key: str, pattern: Mapping[str, float]) -> dict[str, float]:
    return {f"{key}[{name!r}]": value for name, value in pattern.items()}


def _check_expression(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key}={pattern!r} is not a regular expression: {error}.") from None


def _matches_entry(patterns: str | list[str], entry: str, name: str) -> bool:
    """A string is an expression for the whole name; an entry of a list is the name or the end of it after a dot."""
    if isinstance(patterns, str):
        return re.fullmatch(entry, name) is not None
    return name == entry or name.endswith(f".{entry}")


def _matches(patterns: str | list[str], name: str) -> bool:
    entries = [patterns] if isinstance(patterns, str) else patterns
    return any(entry and _matches_entry(patterns, entry, name) for entry in entries)


def _pattern_matches(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _first_match(patterns: Mapping[str, T], name: str, default: T) -> T:
    return next((value for pattern, value in patterns.items() if _pattern_matches(pattern, name)), default)
