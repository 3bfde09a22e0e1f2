"""Defines `LoRAConfig`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lora_lightning.lora.matching import Names

INITS = ("kaiming", "gaussian", "pissa", "mica", "eva")
QKV = ("q", "k", "v", "qk", "qv", "kv")
BIASES = ("none", "all", "lora_only")
_PATTERNS = (
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
)
_RANK_IS = "a LoRA rank is a whole number of at least 1, for example rank=8."
_ALPHA_IS = "alpha is a finite number above 0. Leave it out to use alpha = rank."


@dataclass(frozen=True)
class LoRAConfig:
    """Configures which layers to adapt, and how.

    An adapted layer computes `y = W x + b + s B A x`. A has the shape (r, in), B has the shape (out, r), and the scale
    is `s = alpha / r` (LoRA, https://arxiv.org/abs/2106.09685, section 4.1). B is initialized to zero, so an untrained
    adapter has no effect.

    Args:
        rank: Rank r. It is lowered to min(in, out) for smaller layers, with a log line. The scale stays that of the
            requested rank.
        alpha: Numerator of the scale. `None` means `rank`, for a scale of 1.
        dropout: Probability of zeroing an element of the input of the adapter in training. The base is not affected.
        target_modules: Layers to adapt: `"all"` (in models from the transformers library, all linear layers except the
            output head), a list of names, where `"linear1"` also matches `"backbone.linear1"`, or a regular expression
            for the full dotted name. A single weight of a layer has a name as well: `"lstm.weight_hh_l0"`.
        exclude_modules: Layers not to adapt, in the format of `target_modules`.
        target_parameters: Parameters of any module, in the format of `target_modules`. Those of shape (experts, ...)
            get one adapter per expert.
        modules_to_save: Modules to train in full, such as a new head, in the format of `target_modules`.
        rank_pattern: Other ranks, by regular expressions for a dotted name or its last components. The first match is
            used.
        alpha_pattern: Other alphas, in the format of `rank_pattern`.
        init: `"kaiming"`: A uniform, B zero. `"gaussian"`: A normal with standard deviation 1 / r, B zero. `"pissa"`:
            from the largest singular values of W (https://arxiv.org/abs/2404.02948), where the layer adds the
            difference to the initial values. `"mica"`: B from the left singular vectors of W with the smallest singular
            values, A zero, and only A is trained (https://arxiv.org/abs/2604.01694). `"eva"`: A from the principal
            components of the inputs of the layer, B zero, where `rank` is the mean of ranks that are redistributed by
            explained variance (https://arxiv.org/abs/2410.07170). This needs batches: see `eva`.
        use_rslora: Scale by alpha / sqrt(r) (rsLoRA, https://arxiv.org/abs/2312.03732, equation 5).
        use_dora: Train the norm of each row of W + s B A as a vector m (DoRA, https://arxiv.org/abs/2402.09353,
            equation 5).
        qkv: Which of query, key and value to adapt, such as `"qv"`, in targets whose output holds all three: those
            with three times as many outputs as inputs. Other targets are adapted as usual.
        qkv_sizes: The numbers of outputs for query, key and value, such as `[32, 8, 8]`, if these differ, as in
            grouped-query attention. `qkv` then applies to targets with this total number of outputs.
        bias: Biases of the base to train in full: `"none"`, `"all"` of them (parameters named `bias`), or `"lora_only"`
            for those of the adapted layers.
        lora_bias: Whether B has a bias c, for `y = W x + b + s (B A x + c)`. For layers that are called, such as linear
            layers and convolutions.
        bypass: `(in_features, out_features)` of an adapter around the whole module f, for `f(x) + s B A flatten(x)`.

    Raises:
        ValueError: If a value is out of range, or an expression is not valid.
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
    qkv_sizes: list[int] = field(default_factory=list)
    bias: str = "none"
    lora_bias: bool = False
    bypass: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check_rank("rank", self.rank)
        for key, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{key!r}]", rank)
        if self.alpha is not None:
            _check_alpha("alpha", self.alpha)
        for key, alpha in self.alpha_pattern.items():
            _check_alpha(f"alpha_pattern[{key!r}]", alpha)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: expected a probability of at least 0 and below 1.")
        if self.init not in INITS:
            raise ValueError(f"init={self.init!r}: expected one of {', '.join(INITS)}.")
        if not (self.target_modules or self.target_parameters or self.bypass):
            raise ValueError(
                f"target_modules={self.target_modules!r}: this selects nothing. Expected 'all', names or a pattern."
            )
        if self.qkv and self.qkv not in QKV:
            raise ValueError(f"qkv={self.qkv!r}: expected one or two of q, k, v, as 'qv'.")
        if self.qkv_sizes:
            _check_sizes(self.qkv_sizes, self.qkv)
        if self.bias not in BIASES:
            raise ValueError(f"bias={self.bias!r}: expected one of {', '.join(BIASES)}.")
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias=True cannot be combined with use_dora=True, as in PEFT: use one of them.")
        others = [name for name in ("use_dora", "qkv", "lora_bias") if getattr(self, name)]
        if self.init == "mica" and others:
            raise ValueError(f"init='mica' cannot be combined with {', '.join(others)}. Use one of them.")
        if self.bypass is not None and (len(self.bypass) != 2 or min(self.bypass) < 1):
            raise ValueError(
                f"bypass={self.bypass!r}: expected sizes of flattened input and output, for example (784, 10)."
            )
        for name in _PATTERNS:
            try:
                Names(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name}={error}") from None

    def selects(self, *names: str) -> bool:
        """Return whether to adapt a supported layer with these dotted names."""
        return (self.target_modules == "all" or self._targets.match(*names)) and not self._excluded.match(*names)

    def rank_of(self, *names: str) -> int:
        """Return the requested rank of a layer with these dotted names."""
        pattern = self._ranks.first(*names)
        return self.rank if pattern is None else self.rank_pattern[pattern]

    def alpha_of(self, *names: str) -> float:
        """Return the alpha of a layer with these dotted names, which defaults to its rank."""
        pattern = self._alphas.first(*names)
        if pattern is not None:
            return self.alpha_pattern[pattern]
        return self.rank_of(*names) if self.alpha is None else self.alpha

    def scaling_of(self, *names: str) -> float:
        """Return the scale s of a layer with these dotted names, for the requested rank."""
        rank = self.rank_of(*names)
        return self.alpha_of(*names) / (math.sqrt(rank) if self.use_rslora else rank)

    @cached_property
    def _targets(self) -> Names:
        return Names(self.target_modules)

    @cached_property
    def _excluded(self) -> Names:
        return Names(self.exclude_modules)

    @cached_property
    def _ranks(self) -> Names:
        return Names(self.rank_pattern)

    @cached_property
    def _alphas(self) -> Names:
        return Names(self.alpha_pattern)


def _check_rank(name: str, rank: object) -> None:
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{name}={rank!r}: {_RANK_IS}")


def _check_sizes(sizes: Sequence[object], qkv: str) -> None:
    if len(sizes) != 3 or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(
            f"qkv_sizes={sizes!r}: expected the numbers of outputs for query, key and value, for example [32, 8, 8]."
        )
    if not qkv:
        raise ValueError(f"qkv_sizes={sizes!r} has no effect without qkv: say which of them to adapt, as qkv='qv'.")


def _check_alpha(name: str, alpha: object) -> None:
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise ValueError(f"{name}={alpha!r}: {_ALPHA_IS}")
