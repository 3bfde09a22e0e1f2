"""Defines `LoRAConfig` and the rules for matching layer names."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

# Mixins of variants, by the value of `init` or the name of the flag that selects them.
VARIANTS: dict[str, Any] = {}


@dataclass(frozen=True)
class LoRAConfig:
    """Configures which layers to adapt, and how.

    An adapted layer computes `y = W x + b + s B A x`. A has the shape (r, in), B has the shape (out, r), and the scale is
    `s = alpha / r` (LoRA, https://arxiv.org/abs/2106.09685, section 4.1). B is initialized to zero, so an untrained adapter has no effect.

    Args:
        rank: Rank r. It is lowered to min(in, out) for smaller layers, with a log line.
        alpha: Numerator of the scale. `None` means `rank`, for a scale of 1.
        dropout: Probability of zeroing an element of the input of the adapter in training. The base is not affected.
        target_modules: Layers to adapt: `"all"` (in models from the transformers library, all linear layers except the output head),
            a list of names, where `"linear1"` also matches `"backbone.linear1"`, or a regular expression for the full dotted name.
            A single weight of a layer has a name as well: `"lstm.weight_hh_l0"`.
        exclude_modules: Layers not to adapt, in the format of `target_modules`.
        target_parameters: Parameters of any module, in the format of `target_modules`. Those of shape (experts, ...) get one adapter per expert.
        modules_to_save: Modules to train in full, such as a new head, in the format of `target_modules`.
        rank_pattern: Other ranks, by regular expressions for a dotted name or its last components. The first match is used.
        alpha_pattern: Other alphas, in the format of `rank_pattern`.
        init: `"kaiming"`: A uniform, B zero. `"gaussian"`: A normal with standard deviation 1 / r, B zero. `"pissa"`: from the
            largest singular values of W (https://arxiv.org/abs/2404.02948), where the layer adds the difference to the initial values.
        use_rslora: Scale by alpha / sqrt(r) (rsLoRA, https://arxiv.org/abs/2312.03732, equation 5).
        use_dora: Train the norm of each row of W + s B A as a vector m (DoRA, https://arxiv.org/abs/2402.09353, equation 5).
        qkv: Which of query, key and value to adapt, such as `"qv"`, in targets whose output is their concatenation.
        bypass: `(in_features, out_features)` of an adapter around the whole module f, for `f(x) + s B A flatten(x)`.

    Raises:
        ValueError: If a value is out of range.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | list[str] = "all"
    exclude_modules: str | list[str] = field(default_factory=list)
    target_parameters: str | list[str] = field(default_factory=list)
    modules_to_save: str | list[str] = field(default_factory=list)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init: str = "kaiming"
    use_rslora: bool = False
    use_dora: bool = False
    qkv: str = ""
    bypass: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        ranks = {"rank": self.rank} | {f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}
        alphas = {"alpha": self.alpha} if self.alpha is not None else {}
        alphas |= {f"alpha_pattern[{key!r}]": alpha for key, alpha in self.alpha_pattern.items()}
        inits = ["kaiming", "gaussian", *(key for key in VARIANTS if not hasattr(LoRAConfig, key))]
        rank_is = "a LoRA rank is a whole number of at least 1, for example rank=8."
        alpha_is = "alpha is a finite number above 0. Leave it out to use alpha = rank."
        sizes = self.bypass is None or (len(self.bypass) == 2 and min(self.bypass) >= 1)
        some = bool(self.target_modules or self.target_parameters or self.bypass)
        checks: list[tuple[str, object, bool, str]] = [
            *((key, rank, type(rank) is int and rank >= 1, rank_is) for key, rank in ranks.items()),
            *((key, a, type(a) in (int, float) and 0 < a < float("inf"), alpha_is) for key, a in alphas.items()),
            ("dropout", self.dropout, 0 <= self.dropout < 1, "expected a probability of at least 0 and below 1."),
            ("init", self.init, self.init in inits, f"expected one of {', '.join(inits)}."),
            ("target_modules", self.target_modules, some, "this selects nothing. Expected 'all', names or a pattern."),
            ("qkv", self.qkv, self.qkv in ("", *"qkv", "qk", "qv", "kv"), "expected one or two of q, k, v, as 'qv'."),
            ("bypass", self.bypass, sizes, "expected sizes of flattened input and output, for example (784, 10)."),
        ]
        for key, value, valid, what in checks:
            if not valid:
                raise ValueError(f"{key}={value!r}: {what}")
        for key in [key for key in vars(self) if key.endswith(("_modules", "_parameters", "_to_save", "_pattern"))]:
            try:
                Names(getattr(self, key))
            except re.error as error:
                raise ValueError(f"{key}={error.pattern!r} is not a regular expression: {error}.") from None

    @property
    def variants(self) -> tuple[Any, ...]:
        """Return the mixins for this configuration."""
        return tuple(mixin for key, mixin in VARIANTS.items() if self.init == key or getattr(self, key, False))

    def selects(self, *names: str) -> bool:
        """Return whether to adapt a supported layer with these dotted names."""
        return (self.target_modules == "all" or self._targets(*names)) and not self._excluded(*names)

    def rank_of(self, *names: str) -> int:
        """Return the rank of a layer with these dotted names."""
        pattern = self._ranks.first(*names)
        return self.rank if pattern is None else self.rank_pattern[pattern]

    def alpha_of(self, *names: str, rank: int | None = None) -> float:
        """Return the alpha of a layer with these dotted names, which defaults to its rank."""
        if (pattern := self._alphas.first(*names)) is not None:
            return self.alpha_pattern[pattern]
        return self.alpha if self.alpha is not None else rank or self.rank_of(*names)

    def scaling_of(self, *names: str, rank: int | None = None) -> float:
        """Return the scale s of a layer with these dotted names, optionally for a given rank."""
        rank = rank or self.rank_of(*names)
        return self.alpha_of(*names, rank=rank) / (rank**0.5 if self.use_rslora else rank)

    _targets = cached_property(lambda self: Names(self.target_modules))
    _excluded = cached_property(lambda self: Names(self.exclude_modules))
    _ranks = cached_property(lambda self: Names(self.rank_pattern))
    _alphas = cached_property(lambda self: Names(self.alpha_pattern))


class Names:
    """Matches dotted names against patterns: an expression, a list of names, or the keys of a `rank_pattern`."""

    def __init__(self, patterns: str | list[str] | Mapping[str, object]) -> None:
        self._patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        self._by_end = isinstance(patterns, Mapping)
        self._literals: dict[str, int] = {}  # a look-up for literal names, of which there may be thousands
        self._expressions: list[tuple[int, re.Pattern[str]]] = []
        for index, pattern in enumerate(self._patterns):
            name = re.sub(r"\\(.)", r"\1", pattern) if self._by_end else pattern
            if isinstance(patterns, list) or (name and self._by_end and re.escape(name) == pattern):
                self._literals.setdefault(name, index)
            else:
                self._expressions.append((index, re.compile(pattern)))

    def __call__(self, *names: str) -> bool:
        return self.first(*names) is not None

    def first(self, *names: str) -> str | None:
        """Return the first pattern that matches one of these names."""
        ends = [end for name in names for end in (endings(name) if self._by_end else (name,))]
        found = [index for index, expression in self._expressions if any(map(expression.fullmatch, ends))][:1]
        found += [self._literals[end] for name in names for end in endings(name) if end in self._literals]
        return self._patterns[min(found)] if found else None

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Return the patterns that match none of these names."""
        names = set(names)
        ends = {end for name in names for end in endings(name)}
        missing = [index for name, index in self._literals.items() if name not in ends]
        ends = ends if self._by_end else names
        missing += [index for index, expression in self._expressions if not any(map(expression.fullmatch, ends))]
        return [self._patterns[index] for index in sorted(missing)]


def endings(name: str) -> list[str]:
    """Return a dotted name and each of its suffixes after a dot: `a.b.c`, `b.c`, `c`."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
