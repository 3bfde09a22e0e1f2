"""The adapted layers.

An adapted layer is the layer itself, its class swapped for a subclass that knows about its adapter:

    x ──┬── W, b (frozen) ───────────────┬── y
        └── dropout ── A ── B ── · s ────┘

Base parameters keep their names, so plain checkpoints load before and after, `isinstance` stays true, and hooks and
references survive.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.config import Initialisation


class LoRALinear(nn.Linear):
    """`nn.Linear` with a low-rank adapter beside its frozen weight.

    `y = x Wᵀ + b + s (x Aᵀ) Bᵀ` for x of shape (..., in), `lora_A` of shape (r, in) and `lora_B` of shape (out, r)
    (LoRA, https://arxiv.org/abs/2106.09685, equation 3). The product B A is formed only to merge.

    Layers become this class through `attach`, never by construction.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scaling: float
    lora_dropout: float
    lora_active: bool

    def adapt(self, rank: int, scaling: float, dropout: float, init: Initialisation) -> None:
        """Adds a fresh adapter: A random, B zero.

        The adapter is drawn on the CPU, so that a seed gives the same adapter on every device, and kept in float32
        over a base of lower precision.
        """
        weight = self.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        down = torch.empty(rank, self.in_features, dtype=dtype)
        if init == "gaussian":
            nn.init.normal_(down, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self.lora_A = nn.Parameter(down.to(weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=dtype, device=weight.device))
        self.lora_scaling = scaling
        self.lora_dropout = dropout
        self.lora_active = True

    def forward(self, input: Tensor) -> Tensor:
        # On a batch of ten every microsecond shows: self.weight would miss in one dictionary before it hits.
        parameters = self._parameters
        weight, bias = cast(Tensor, parameters["weight"]), parameters["bias"]
        if not self.lora_active:
            return F.linear(input, weight, bias)
        down, up = cast(Tensor, parameters["lora_A"]), cast(Tensor, parameters["lora_B"])
        drops = self.lora_dropout and self.training
        if not drops and _fused_backward_applies(input, weight, bias, down, up):
            return cast(Tensor, _FusedLoRALinear.apply(input, weight, bias, down, up, self.lora_scaling))
        adapter_input = F.dropout(input, self.lora_dropout) if drops else input
        return _linear_beside(adapter_input, input, weight, bias, down, up, self.lora_scaling)

    def delta(self) -> Tensor:
        """ΔW = s B A, of the weight's shape, in the adapter's precision."""
        return (self.lora_B @ self.lora_A) * self.lora_scaling

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.lora_A.shape[0]}, scaling={self.lora_scaling:g}"


ADAPTED: dict[type[nn.Module], type[LoRALinear]] = {nn.Linear: LoRALinear}
"""From a layer's class to the class it is swapped for."""


def _linear_beside(
    adapter_input: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float,
) -> Tensor:
    """The two paths as plain operations: for autocast, compilers, function transforms and mixed precision."""
    y = F.linear(input, weight, bias)
    low = F.linear(adapter_input.to(down.dtype), down)
    if torch.is_grad_enabled() or not y.dtype == low.dtype == up.dtype:
        return y + (F.linear(low, up) * scaling).to(y.dtype)
    return _add_product(y, low, up, scaling)


def _add_product(y: Tensor, low: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Forms y + s h Bᵀ in y's own memory: no pass over the activations but the product itself."""
    if y.dim() == 2:
        return y.addmm_(low, up.t(), alpha=scaling)
    y = y.contiguous()
    y.view(-1, y.shape[-1]).addmm_(_rows(low), up.t(), alpha=scaling)
    return y


def _rows(tensor: Tensor) -> Tensor:
    """(..., features) as (rows, features)."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _fused_backward_applies(input: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> bool:
    """Whether the hand-written backward may stand in for the plain operations."""
    return (
        torch.is_grad_enabled()
        and down.requires_grad
        and up.requires_grad
        and not weight.requires_grad
        and not (bias is not None and bias.requires_grad)
        and input.dtype == weight.dtype == down.dtype
        and not torch.compiler.is_compiling()
        and type(input) in (Tensor, nn.Parameter)
        and not torch._C._is_any_autocast_enabled()
        and not torch._C._are_functorch_transforms_active()
    )


class _FusedLoRALinear(torch.autograd.Function):
    """Both paths as one node of the graph.

    Against the plain operations it saves one pass over y in the forward (the low-rank product is added in place) and
    one over dx in the backward; with G = dL/dy and h = x Aᵀ:

        dB = s Gᵀ h        dA = (s G B)ᵀ x        dx = G W + (s G B) A
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        low = _rows(input).mm(down.t())
        ctx.save_for_backward(input, weight, down, up, low)
        ctx.scaling = scaling
        return _add_product(F.linear(input, weight, bias), low, up, scaling)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        input, weight, down, up, low = ctx.saved_tensors
        x, gradient, scaling = _rows(input), _rows(grad_output), ctx.scaling
        if torch.is_grad_enabled():
            # A second derivative (create_graph=True) needs h as a function of x and A, not as a saved number.
            low = x.mm(down.t())
        grad_low = gradient.mm(up)
        if scaling != 1:
            grad_low, low = grad_low * scaling, low * scaling
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = gradient.mm(weight).addmm_(grad_low, down).view_as(input)
        return grad_input, None, None, grad_low.t().mm(x), gradient.t().mm(low), None
