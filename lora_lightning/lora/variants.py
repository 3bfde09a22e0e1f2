"""Variants of LoRA: DoRA, PiSSA, MiCA, and adapters of some of query, key and value, as subclasses of `Adapter`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_lightning.lora.adapter import Adapter, L, Layout, parameter_of, without_autocast
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.low_rank import low_rank_factors

if TYPE_CHECKING:
    from lora_lightning.lora.layers import CalledKind


class PiSSAAdapter(Adapter):
    """Starts from the largest singular values of W, and adds the difference to the initial values, s (B A - B0 A0).

    PiSSA (https://arxiv.org/abs/2404.02948, section 3) subtracts s B0 A0 from W. Here W is not modified.

    Attributes:
        lora_A_initial: A0.
        lora_B_initial: B0.
    """

    reads_weight = True
    label = "PiSSA"
    lora_A_initial: Tensor
    lora_B_initial: Tensor

    @classmethod
    def refusal(cls, weight: Tensor, layout: Layout, config: LoRAConfig) -> str | None:
        if layout.experts:
            return "contains one matrix per expert, for which only plain LoRA is supported: use neither DoRA nor PiSSA"
        if weight.is_meta:
            return "is on meta, and PiSSA starts from its singular values: load the weights first"
        if not bool(weight.isfinite().all()):
            return "has weights that are not finite, so PiSSA cannot compute singular values"
        return super().refusal(weight, layout, config)

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        matrix = self.layout.matrix(weight.detach())
        a, b = low_rank_factors(matrix.to(self.lora_A.dtype), self.rank)
        root = self.scaling**0.5
        self.lora_A.copy_(a / root)
        self.lora_B.copy_(b / root)
        if self.layout.zero_column is not None:
            self.lora_A[..., self.layout.zero_column].zero_()
        self.register_buffer("lora_A_initial", self.lora_A.detach().clone())
        self.register_buffer("lora_B_initial", self.lora_B.detach().clone())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Return to the initial values."""
        self.lora_A.copy_(self.lora_A_initial)
        self.lora_B.copy_(self.lora_B_initial)
        self.reset_bias()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return factors of rank 2 r for B A - B0 A0 = (B - B0) A + B0 (A - A0), which is exactly zero initially."""
        a, b = super().factors()
        return torch.cat((a, a - self.lora_A_initial)), torch.cat((b - self.lora_B_initial, self.lora_B_initial), dim=1)

    def scale(self, factor: float, weight: Tensor) -> None:
        raise ValueError(
            "Adapters of PiSSA add the difference to their initial values, which cannot be scaled by a factor of B."
        )


class MiCAAdapter(Adapter):
    """Trains A alone, on a B of the left singular vectors of W with the smallest singular values.

    A is zero initially (MiCA, https://arxiv.org/abs/2604.01694).
    """

    reads_weight = True
    label = "MiCA"
    fixed = ("lora_B",)

    @classmethod
    def refusal(cls, weight: Tensor, layout: Layout, config: LoRAConfig) -> str | None:
        if layout.experts:
            return "contains one matrix per expert, for which only plain LoRA is supported: use no other init"
        if weight.is_meta:
            return "is on meta, and MiCA starts from its singular vectors: load the weights first"
        if not bool(weight.isfinite().all()):
            return "has weights that are not finite, so MiCA cannot compute singular vectors"
        return super().refusal(weight, layout, config)

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        left, _, _ = torch.linalg.svd(self.layout.matrix(weight.detach()).to(self.lora_B.dtype), full_matrices=False)
        self.lora_B.copy_(left[:, -self.rank :])
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set A to zero."""
        self.lora_A.zero_()

    def base_changed(self, weight: Tensor) -> None:
        """Start from a W that was loaded or written, if the adapter is untrained."""
        if self.is_zero():
            self.start(weight)


class DoRAAdapter(Adapter):
    """Also trains the norm of each row of the effective weight, W' = m (W + s B A) / ||W + s B A||.

    The norm is treated as a constant in the backward pass (DoRA, https://arxiv.org/abs/2402.09353, equation 5 and
    section 4.3). Within `scaled`, λ scales B A and the change of the norms, m = ||W|| + λ (m - ||W||).

    Attributes:
        lora_magnitude_vector: m, of shape (out,).
    """

    reads_weight = True
    is_linear = False
    label = "DoRA"
    lora_magnitude_vector: nn.Parameter

    @classmethod
    def refusal(cls, weight: Tensor, layout: Layout, config: LoRAConfig) -> str | None:
        if layout.experts:
            return "contains one matrix per expert, for which only plain LoRA is supported: use neither DoRA nor PiSSA"
        if weight.is_meta:
            return "is on meta, and DoRA starts from the norms of its rows: load the weights first"
        return super().refusal(weight, layout, config)

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        super().start(weight)
        norms = self._norms(weight, self.scaling)
        if "lora_magnitude_vector" in self._parameters:
            self.lora_magnitude_vector.copy_(norms)
        else:
            self.lora_magnitude_vector = nn.Parameter(norms)

    @torch.no_grad()
    def base_changed(self, weight: Tensor) -> None:
        """Take the norms of a W that was loaded or written, if the adapter is untrained."""
        if self.is_zero():
            self.lora_magnitude_vector.copy_(self._norms(weight, self.scaling))

    def delta_weight(self, weight: Tensor) -> Tensor:
        ratio = self._ratio(weight)[:, None]
        matrix = self.layout.matrix(weight).to(ratio.dtype)
        return self.layout.weight((ratio - 1) * matrix + ratio * self.product(), weight.shape)

    def change(self, kind: CalledKind[L], layer: L, weight: Tensor, input: Tensor, output: Tensor) -> Tensor:
        # Computed as a change of W x, so that an untrained adapter changes no bit.
        ratio, bias = kind.per_output(layer, self._ratio(kind.dense(layer, weight))), kind.bias(layer)
        unbiased = output if bias is None else output - kind.per_output(layer, bias)
        return (ratio - 1) * unbiased + ratio * super().change(kind, layer, weight, input, output)

    @torch.no_grad()
    def scale(self, factor: float, weight: Tensor) -> None:
        super().scale(factor, weight)
        initial = self._norms(weight, 0.0)
        self.lora_magnitude_vector.copy_(initial + factor * (self.lora_magnitude_vector - initial))

    def _ratio(self, weight: Tensor) -> Tensor:
        """Return m / ||W + s B A||, of shape (out,)."""
        magnitude = parameter_of(self, "lora_magnitude_vector")
        norms = self._norms(weight, self.scaling * self.strength)
        wanted: Tensor = magnitude
        if self.strength != 1:
            initial = self._norms(weight, 0.0)
            wanted = initial + self.strength * (magnitude - initial)
        return torch.where(norms > 0, wanted / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1)

    @torch.no_grad()
    def _norms(self, weight: Tensor, scaling: float) -> Tensor:
        """Return the norm of each row of W + s B A without computing B A.

        ||w + s b A||² = ||w||² + 2 s b·(A w) + s² (b A)·(b A), with the last term computed as b (A Aᵀ) bᵀ.
        """
        a, b = (factor.detach() for factor in self.factors())
        with without_autocast(a):
            matrix = self.layout.matrix(weight.detach()).to(a.dtype)
            crossed = matrix @ a.mT * 2 + b @ (a @ a.mT) * scaling
            squares = matrix.square().sum(1) + scaling * (b * crossed).sum(1)
            return squares.clamp_min(0).sqrt()


class PiSSADoRAAdapter(DoRAAdapter, PiSSAAdapter):
    """Combines the initial values of PiSSA with the norms of DoRA."""

    label = "PiSSA, DoRA"


class QKVAdapter(Adapter):
    """Adapts some of query, key and value in a layer whose output is their concatenation.

    B has rows for all three, as in PEFT's folders. The rows of the others are multiplied by zero, so they have no
    effect and no gradient.
    """

    @classmethod
    def refusal(cls, weight: Tensor, layout: Layout, config: LoRAConfig) -> str | None:
        if config.use_dora or config.init == "pissa":
            return f"cannot combine qkv={config.qkv!r} with DoRA or PiSSA, which change all rows of a weight"
        return super().refusal(weight, layout, config)

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = super().factors()
        return a, self._kept(b)

    def in_words(self) -> str:
        sizes = " of " + " + ".join(map(str, self.config.qkv_sizes)) if self.config.qkv_sizes else ""
        return f"{super().in_words()}, {self.config.qkv}{sizes} alone"

    def own_bias(self) -> Tensor:
        return self._kept(super().own_bias())

    def _kept(self, values: Tensor) -> Tensor:
        """Return values with a row for each output. Those of the parts that are not adapted are zero."""
        parts = torch.split(values, self.config.qkv_sizes or len(values) // 3)
        return torch.cat([part * float(name in self.config.qkv) for part, name in zip(parts, "qkv", strict=True)])


def adapter_class(config: LoRAConfig, is_qkv: bool = False) -> type[Adapter]:
    """Return the class of the adapters for a configuration.

    Args:
        config: The configuration.
        is_qkv: Whether the output of the layer is the concatenation of query, key and value.
    """
    if config.qkv and is_qkv:
        return QKVAdapter
    if config.use_dora:
        return PiSSADoRAAdapter if config.init == "pissa" else DoRAAdapter
    if config.init == "mica":
        return MiCAAdapter
    return PiSSAAdapter if config.init == "pissa" else Adapter
