"""Both paths of an adapted linear layer as one node of the graph, with a backward pass written by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FusedLoRALinear(torch.autograd.Function):
    """`y = x Wᵀ + b + s (x Aᵀ) Bᵀ`.

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
        return add_product(F.linear(input, weight, bias), low, up, scaling)

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


def fused_backward_applies(input: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> bool:
    """Whether the hand-written backward may stand in for the plain operations."""
    return (
        torch.is_grad_enabled()
        and down.requires_grad
        and up.requires_grad
        and not weight.requires_grad
        and not (bias is not None and bias.requires_grad)
        and input.dtype == weight.dtype == down.dtype
        and type(input) in _PLAIN
        and type(weight) in _PLAIN
        and not torch._C._is_any_autocast_enabled()
        and not torch._C._are_functorch_transforms_active()
    )


def add_product(y: Tensor, low: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Forms y + s h Bᵀ in y's own memory: no pass over the activations but the product itself."""
    if y.dim() == 2:
        return y.addmm_(low, up.t(), alpha=scaling)
    y = y.contiguous()
    y.view(-1, y.shape[-1]).addmm_(_rows(low), up.t(), alpha=scaling)
    return y


_PLAIN = (Tensor, nn.Parameter)


def _rows(tensor: Tensor) -> Tensor:
    """(..., features) as (rows, features)."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
