"""Defines the variants PiSSA, DoRA and QKV, each as one mixin for the class of an adapted layer."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.lora.config import VARIANTS, LoRAConfig
from lora_lightning.lora.layers import LoRALayer, dense, full_precision
from lora_lightning.lora.low_rank import low_rank_factors


class PiSSA(LoRALayer):
    """Initializes A and B from the largest singular values of W and adds the difference to the initial values, s (B A - B0 A0).

    PiSSA (https://arxiv.org/abs/2404.02948, section 3) subtracts s B0 A0 from W. Here W is not modified.
    """

    lora_A_initial: Tensor
    lora_B_initial: Tensor

    @classmethod
    def lora_refusal(cls, layer: nn.Module, weight: Tensor, config: LoRAConfig) -> str | None:
        finite = bool(dense(weight).isfinite().all())
        return None if finite else "has weights that are not finite, so PiSSA cannot compute singular values"

    def lora_start(self, weight: Tensor, rank: int, config: LoRAConfig) -> tuple[Tensor, Tensor]:
        matrix = self.lora_matrix(self.lora_dense(weight).detach().to(torch.promote_types(weight.dtype, torch.float32)))
        a, b = low_rank_factors(matrix, rank)
        root = self.lora_scaling**0.5
        reshaped: tuple[Tensor, Tensor] = self.lora_reshape(a / root, b / root, weight)
        return reshaped

    def lora_create(self, weight: Tensor, rank: int, scaling: float, config: LoRAConfig) -> None:
        super().lora_create(weight, rank, scaling, config)
        for name, key in zip(self.lora_names, ("lora_A_initial", "lora_B_initial"), strict=True):
            self.register_buffer(key, self.get_parameter(name).detach().clone())

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """Return factors of twice the rank for B A - B0 A0 = (B - B0) A + B0 (A - A0), which is exactly zero initially."""
        a, b = super().lora_factors()
        return torch.cat((a, a - self.lora_A_initial)), torch.cat((b - self.lora_B_initial, self.lora_B_initial), dim=1)


class DoRA(LoRALayer):
    """Trains the norm of each row of the effective weight: W' = m (W + s B A) / ||W + s B A||.

    The norm is treated as a constant in the backward pass (DoRA, https://arxiv.org/abs/2402.09353, equation 5 and section 4.3).
    """

    lora_magnitude_vector: nn.Parameter

    def lora_create(self, weight: Tensor, rank: int, scaling: float, config: LoRAConfig) -> None:
        super().lora_create(weight, rank, scaling, config)
        shape = magnitude_shape(self.lora_factors()[1])
        self.lora_magnitude_vector = nn.Parameter(self._lora_norms(weight).view(shape))

    def lora_effective_weight(self, weight: Tensor) -> Tensor:
        base, delta = self.lora_dense(weight), self.lora_delta_weight(weight)
        full = self.lora_matrix(base.to(delta.dtype) + delta) * self._lora_ratio(weight)[:, None]
        return self.lora_from_matrix(full, weight).to(base.dtype)

    def forward(self, input: Tensor) -> Tensor:
        # Computed as a change of W x + b, so that an untrained adapter changes no bit.
        output = self.lora_base(input)
        if not self.lora_active:
            return output
        ones = (1,) * (self.lora_factors()[1].dim() - 2)  # a convolution's channels come before its positions
        ratio = self._lora_ratio(cast(Tensor, self._parameters["weight"])).view(-1, *ones)
        bias = cast(Any, self).bias if hasattr(self, "bias") else None
        unbiased = output if bias is None else output - bias.view(-1, *ones)
        change = (ratio - 1) * unbiased + ratio * self.lora_change(input)
        return output + change.to(output.dtype)

    def _lora_ratio(self, weight: Tensor) -> Tensor:
        """Return m / ||W + s B A||, of shape (out,)."""
        norms, magnitude = self._lora_norms(weight), self.lora_magnitude_vector.view(-1)
        return torch.where(norms > 0, magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1)

    @torch.no_grad()
    def _lora_norms(self, weight: Tensor) -> Tensor:
        """Return the norm of each row of W + s B A without computing B A.

        ||w + s b A||² = ||w||² + 2 s b·(A w) + s² (b A)·(b A), with the last term computed as b (A Aᵀ) bᵀ.
        """
        a, b = (factor.detach().flatten(1) for factor in self.lora_factors())
        with full_precision(a):
            matrix = self.lora_matrix(self.lora_dense(weight).detach()).to(a.dtype)
            crossed = matrix @ a.t() * 2 + b @ (a @ a.t()) * self.lora_scaling
            squares = matrix.square().sum(1) + self.lora_scaling * (b * crossed).sum(1)
            return squares.clamp_min(0).sqrt()


class QKV(LoRALayer):
    """Adapts some of query, key and value in a layer whose output is their concatenation.

    B has rows for all three, as in PEFT's folders. The rows of the others are multiplied by zero, so they have no effect and no gradient.
    """

    lora_kept: tuple[float, float, float]

    @classmethod
    def lora_refusal(cls, layer: nn.Module, weight: Tensor, config: LoRAConfig) -> str | None:
        if config.use_dora or config.init == "pissa":
            return f"cannot combine qkv={config.qkv!r} with DoRA or PiSSA, which change all rows of a weight"
        if any("query_key_value" in name for name in (config.target_modules, *config.target_modules)):
            return f"may interleave query, key and value by head, but qkv={config.qkv!r} expects three blocks"
        sizes = [getattr(layer, name, 0) for name in ("out_features", "in_features")]
        rows, columns = sizes if all(sizes) else sorted(weight.flatten(1).shape, reverse=True)
        expected = f"expected three times as many outputs as inputs for qkv={config.qkv!r}"
        return None if rows == 3 * columns else f"has {rows} outputs and {columns} inputs: {expected}"

    def lora_create(self, weight: Tensor, rank: int, scaling: float, config: LoRAConfig) -> None:
        super().lora_create(weight, rank, scaling, config)
        query, key, value = (float(part in config.qkv) for part in "qkv")
        self.lora_kept = query, key, value

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        a, b = super().lora_factors()
        return a, torch.cat([part * kept for part, kept in zip(b.chunk(3), self.lora_kept, strict=True)])


def magnitude_shape(b: Tensor) -> tuple[int, ...]:
    """Return the shape of DoRA's m for a B of this shape: (out,), or (1, out, 1, ...) for a convolution."""
    return (len(b),) if b.dim() == 2 else (1, len(b), *b.shape[2:])


VARIANTS.update(use_dora=DoRA, pissa=PiSSA, qkv=QKV)
