"""The adapted layers.

An adapted layer is the layer itself, its class swapped for a subclass that knows about its adapter:

    x ──┬── W, b (frozen) ───────────────┬── y
        └── dropout ── A ── B ── · s ────┘

Base parameters keep their names, so plain checkpoints load before and after, `isinstance` stays true, and hooks and
references survive. The product B A is formed only to merge.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.fused import FusedLoRALinear, add_product, fused_backward_applies
from lora_lightning.lora.update import LowRankUpdate


class SidePath(LowRankUpdate):
    """A layer that adds its adapter's output to its own; subclasses say how each is computed.

    With DoRA the output is `m / ||W + s B A|| (W x + s B A x) + b`, computed as the change that it makes to W x + b, so that
    a fresh adapter changes no bit.
    """

    def lora_base(self, input: Tensor) -> Tensor:
        """What the layer computes without its adapter."""
        raise NotImplementedError

    def lora_low_rank(self, input: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """B A x, for an input in the adapter's dtype."""
        raise NotImplementedError

    def lora_over_output(self, vector: Tensor) -> Tensor:
        """A vector of one number an output feature, in a shape that multiplies the layer's output."""
        return vector

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            base = self.lora_base(input)
            return base + (self.lora_change(input, base) * self.lora_gate).to(base.dtype)
        base = self.lora_base(input)
        if not self.lora_active:
            return base
        change = self.lora_change(input, base)
        # Nobody has seen `base` yet, nor does a backward pass need it: unless DoRA's does.
        if "lora_magnitude_vector" in self._parameters or torch._C._are_functorch_transforms_active():
            return base + change.to(base.dtype)
        return base.add_(change)

    def lora_change(self, input: Tensor, base: Tensor) -> Tensor:
        """What the adapter adds to the output `base`."""
        down, up = self.lora_factors()
        if input.is_floating_point():
            input = input.to(down.dtype)
            if self.lora_dropout and self.training:
                input = F.dropout(input, self.lora_dropout)
        change = self.lora_low_rank(input, down, up)
        if self.lora_scaling != 1:
            change = change * self.lora_scaling
        if "lora_magnitude_vector" not in self._parameters:
            return change
        ratio = self.lora_over_output(self.lora_dora_ratio(cast(Tensor, self._parameters["weight"])))
        bias = self._parameters.get("bias")
        unbiased = base if bias is None else base - self.lora_over_output(bias)
        return (ratio - 1) * unbiased + ratio * change


class LoRALinear(SidePath, nn.Linear):
    """`nn.Linear` with a low-rank adapter beside its frozen weight.

    `y = x Wᵀ + b + s (x Aᵀ) Bᵀ` for x of shape (..., in), `lora_A` of shape (r, in) and `lora_B` of shape (out, r)
    (LoRA, https://arxiv.org/abs/2106.09685, equation 3).
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def lora_base(self, input: Tensor) -> Tensor:
        # Not self.weight: that may be W + ΔW (see effective.py), and costs a miss in one dictionary before the hit.
        return F.linear(input, cast(Tensor, self._parameters["weight"]), self._parameters["bias"])

    def lora_low_rank(self, input: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.linear(F.linear(input, down), up)

    def forward(self, input: Tensor) -> Tensor:
        # On a batch of ten every microsecond shows.
        if torch.compiler.is_compiling() or not self.lora_active or self._lora_plain_operations():
            return super().forward(input)
        parameters = self._parameters
        weight, bias = cast(Tensor, parameters["weight"]), parameters["bias"]
        down, up = self.lora_factors()
        if fused_backward_applies(input, weight, bias, down, up):
            return cast(Tensor, FusedLoRALinear.apply(input, weight, bias, down, up, self.lora_scaling))
        y = F.linear(input, weight, bias)
        low = F.linear(input.to(down.dtype), down)
        if torch.is_grad_enabled() or not y.dtype == low.dtype == up.dtype:
            return y + (F.linear(low, up) * self.lora_scaling).to(y.dtype)
        return add_product(y, low, up, self.lora_scaling)

    def _lora_plain_operations(self) -> bool:
        return bool(self.lora_dropout and self.training) or "lora_magnitude_vector" in self._parameters


class LoRATransposedLinear(SidePath):
    """The transformers library's `Conv1D`, a linear layer whose weight is of shape (in, out)."""

    @staticmethod
    def lora_matrix(weight: Tensor) -> Tensor:
        return weight.t()

    @staticmethod
    def lora_from_matrix(matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix.t()

    def lora_base(self, input: Tensor) -> Tensor:
        weight, bias = cast(Tensor, self._parameters["weight"]), cast(Tensor, self._parameters["bias"])
        y = torch.addmm(bias, input.view(-1, input.shape[-1]), weight)
        return y.view(*input.shape[:-1], weight.shape[1])

    def lora_low_rank(self, input: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.linear(F.linear(input, down), up)


class LoRAConv(SidePath):
    """A convolution with an adapter: first one to r channels, then one of size 1.

    `lora_A` is of shape (r, in / groups, *kernel) and goes with the layer's stride, padding, padding mode and dilation;
    `lora_B` is of shape (out, r, 1, ...). ΔW[o, i, k] = s Σ_r B[o, r] A[r, i, k], with groups too: every group has the
    same A and its own rows of B.
    """

    groups: int

    @staticmethod
    def lora_shaped(down: Tensor, up: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ones = (1,) * (weight.dim() - 2)
        return down.view(-1, *weight.shape[1:]), up.view(*up.shape, *ones)

    @classmethod
    def lora_magnitude_shape(cls, weight: Tensor) -> tuple[int, ...]:
        return (1, weight.shape[0], *(1 for _ in weight.shape[2:]))

    def lora_over_output(self, vector: Tensor) -> Tensor:
        weight = cast(Tensor, self._parameters["weight"])
        return vector.view(-1, *(1 for _ in weight.shape[2:]))

    def lora_base(self, input: Tensor) -> Tensor:
        return self._lora_conv(input, cast(Tensor, self._parameters["weight"]), self._parameters["bias"])

    def lora_low_rank(self, input: Tensor, down: Tensor, up: Tensor) -> Tensor:
        if self.groups > 1:
            down = down.repeat(self.groups, *(1 for _ in down.shape[1:]))
        by_one = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[up.dim()]
        return by_one(self._lora_conv(input, down, None), up, groups=self.groups)

    def _lora_conv(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own convolution, with another weight."""
        return cast(Tensor, cast(Any, self)._conv_forward(input, weight, bias))


class LoRAConv1d(LoRAConv, nn.Conv1d):
    """`nn.Conv1d` with an adapter."""


class LoRAConv2d(LoRAConv, nn.Conv2d):
    """`nn.Conv2d` with an adapter."""


class LoRAConv3d(LoRAConv, nn.Conv3d):
    """`nn.Conv3d` with an adapter."""


class LoRAEmbedding(SidePath, nn.Embedding):
    """`nn.Embedding` with an adapter: `lora_embedding_A` of shape (r, num), `lora_embedding_B` of shape (dim, r).

    The vector at `padding_idx` stays what it is: A is zero there, and gets no gradient.
    """

    lora_name_A = "lora_embedding_A"
    lora_name_B = "lora_embedding_B"

    lora_embedding_A: nn.Parameter
    lora_embedding_B: nn.Parameter

    def lora_adapt(self, weight: Tensor, rank: int, scaling: float, config: LoRAConfig) -> None:
        super().lora_adapt(weight, rank, scaling, config)
        if self.padding_idx is not None:
            for factor in (self.lora_embedding_A, self._buffers.get("lora_A_initial")):
                if factor is not None:
                    factor.detach()[:, self.padding_idx] = 0

    def lora_fill_kaiming(self, down: Tensor) -> None:
        # An index is a one-hot input: one number arrives, not as many as there are embeddings.
        nn.init.uniform_(down, -1, 1)

    @staticmethod
    def lora_matrix(weight: Tensor) -> Tensor:
        return weight.t()

    @staticmethod
    def lora_from_matrix(matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix.t()

    def lora_base(self, input: Tensor) -> Tensor:
        return F.embedding(input, cast(Tensor, self._parameters["weight"]), self.padding_idx, sparse=self.sparse)

    def lora_low_rank(self, input: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.linear(F.embedding(input, down.t(), self.padding_idx), up)
