"""What to adapt, and how: `LoRAConfig`, and the rules by which it selects layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

T = TypeVar("T", bound=float)
Initialisation = Literal["kaiming", "gaussian", "pissa"]


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
            that has to match the whole dotted name. A layer with several weights (`nn.MultiheadAttention`, `nn.LSTM`) is
            chosen as a whole by its name, or a weight of it by its own (`"lstm.weight_hh_l0"`).
        exclude: Layers to leave out of `targets`, written the same way (a list or a regular expression).
        rank_pattern: Ranks that differ from `rank`. A key is a regular expression that matches a layer's dotted name,
            or the end of it after a dot; the first key that matches counts.
        alpha_pattern: Alphas that differ from `alpha`, written like `rank_pattern`.
        init: How A and B begin. `"kaiming"`: A uniform (the default of the authors' code and of PEFT), B zero.
            `"gaussian"`: A normal with standard deviation 1 / rank (the paper's text), B zero. `"pissa"`: both from the
            largest singular values of the weight (PiSSA, https://arxiv.org/abs/2404.02948, section 3); the weight stays as
            it is, and the adapter adds the difference to where it began, s (B A - B0 A0).
        rslora: Scale by alpha / sqrt(rank) instead (rsLoRA, https://arxiv.org/abs/2312.03732, equation 5).
        dora: Train the norm of each row of W + s B A as a vector m of its own: W' = m (W + s B A) / ||W + s B A||, the norm
            held constant in the backward pass (DoRA, https://arxiv.org/abs/2402.09353, equation 5 and section 4.3).
        target_parameters: Parameters of two or more dimensions to adapt by name, written like `targets`: for modules
            that are none of the supported layers. What reads such a parameter gets W + s B A; one of more than two
            dimensions is taken as the matrix of its first dimension against all others.
        trainable: Modules trained whole beside the adapters, for example a new head; written like `targets`.
        bypass: `(in_features, out_features)` of an adapter around the whole module, which then computes
            `f(x) + s B A flatten(x)`. With `targets=[]` it is the only adapter.

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
    dora: bool = False
    target_parameters: str | list[str] = field(default_factory=list)
    trainable: str | list[str] = field(default_factory=list)
    bypass: tuple[int, int] | None = None

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
        if self.init not in get_args(Initialisation):
            raise ValueError(f"init={self.init!r}: expected one of {', '.join(get_args(Initialisation))}.")
        if not (self.targets or self.target_parameters or self.bypass):
            raise ValueError(
                f"targets={self.targets!r} selects nothing: expected 'all', a list of layer names, or a regular "
                "expression."
            )
        if self.bypass is not None and (len(self.bypass) != 2 or min(self.bypass) < 1):
            raise ValueError(
                f"bypass={self.bypass!r}: expected the sizes of the flattened input and output, for example (784, 10)."
            )
        for key in ("targets", "exclude", "target_parameters", "trainable"):
            if isinstance(pattern := getattr(self, key), str):
                _check_expression(key, pattern)
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, key):
                _check_expression(key, pattern)

    def selects(self, *names: str) -> bool:
        """Whether the supported layer that goes by these dotted names gets an adapter."""
        chosen = self.targets == "all" or any(matches(self.targets, name) for name in names)
        return chosen and not any(matches(self.exclude, name) for name in names)

    def rank_of(self, *names: str) -> int:
        """The rank of the layer that goes by these dotted names."""
        return _first_match(self.rank_pattern, names, self.rank)

    def alpha_of(self, *names: str) -> float:
        """The alpha of the layer that goes by these dotted names; without any alpha given, its rank."""
        default = self.rank_of(*names) if self.alpha is None else self.alpha
        return _first_match(self.alpha_pattern, names, default)

    def scaling_of(self, *names: str) -> float:
        """The scale s of that layer: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        rank = self.rank_of(*names)
        return self.alpha_of(*names) / (rank**0.5 if self.rslora else rank)


def matches(patterns: str | list[str], name: str) -> bool:
    """A string is an expression for the whole name; an entry of a list is the name or the end of it after a dot."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in patterns)


def exactly(names: Iterable[str]) -> str:
    """A regular expression for these names and no others."""
    # A module that is itself the adapted layer has the empty name; "(?:)" matches that and nothing else.
    return "|".join(re.escape(name) for name in names) or "(?:)"


def unmatched(patterns: str | list[str], names: Iterable[str]) -> list[str]:
    """The entries of `patterns` that match none of these names."""
    names = list(names)
    if isinstance(patterns, str):
        return [] if patterns == "all" or any(matches(patterns, name) for name in names) else [patterns]
    return [entry for entry in patterns if not any(matches([entry], name) for name in names)]


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` matches the name, or the end of it after a dot."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _labelled(key: str, pattern: Mapping[str, float]) -> dict[str, float]:
    return {f"{key}[{name!r}]": value for name, value in pattern.items()}


def _check_expression(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key}={pattern!r} is not a regular expression: {error}.") from None


def _first_match(patterns: Mapping[str, T], names: Iterable[str], default: T) -> T:
    names = list(names)
    found = (value for pattern, value in patterns.items() if any(pattern_matches(pattern, name) for name in names))
    return next(found, default)
