"""Computes an adapted linear layer as a single node of the autograd graph, with a hand-written backward pass."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from lora_lightning.lora.adapter import Adapter


def fused_linear(adapter: Adapter, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return the output of a linear layer with one adapter, in fewer passes over the activations.

    Every microsecond counts with a batch of ten.

    Args:
        adapter: The adapter. It changes the output by s B A x.
        input: x, of shape (..., in).
        weight: W, of shape (out, in).
        bias: b, if any.

    Returns:
        y = W x + b + s B A x, or `None` if this has to be computed with PyTorch's operations.
    """
    if type(adapter).change is not Adapter.change or torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return None
    scaling = adapter.scaling * adapter.strength
    dropout = adapter.config.dropout if adapter.training else 0.0
    a, b = adapter.factors()
    if _applies(input, weight, bias, a, b):
        fused: Tensor = _Fused.apply(input, weight, bias, a, b, scaling, dropout)
        return fused
    if dropout or torch.is_grad_enabled() or is_transformed():
        return None
    if a.dtype != input.dtype:
        a, b = a.to(input.dtype), b.to(input.dtype)
    y = F.linear(input, weight, bias)
    low = F.linear(input, a)
    return (
        _add_product(y, low, b, scaling)
        if y.dtype == low.dtype == b.dtype
        else y + (F.linear(low, b) * scaling).to(y.dtype)
    )


def is_transformed() -> bool:
    """Return whether a transform of `torch.func`, or forward-mode differentiation, is in progress.

    A hand-written backward pass does not support these. PyTorch has no public function that tells.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _Context(Protocol):
    """Holds what the forward pass keeps for the backward pass."""

    scaling: float
    dropout: float
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _Fused(torch.autograd.Function):
    """Computes `y = x Wᵀ + b + s (d(x) Aᵀ) Bᵀ`, where d is dropout.

    Compared with the plain operations, this saves one pass over y in the forward pass, where the low-rank product is
    added in place, and one pass over dx in the backward pass. With G = dL/dy and h = d(x) Aᵀ:

        dB = s Gᵀ h        dA = (s G B)ᵀ d(x)        dx = G W + d((s G B) A)        db = Σ G

    The products use A and B in the dtype of x. On CUDA, the gradients of float32 adapters are not rounded to the half
    precision of x.

    With dropout, it keeps x and a mask of one byte per element until the backward pass, and computes d(x) again from
    them. x is kept once for all layers that share it, while the plain operations keep d(x) and a mask for each layer.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        dropped, mask = _dropout(input, dropout) if dropout else (input, None)
        cast_a, cast_b = (a, b) if a.dtype == input.dtype else (a.to(input.dtype), b.to(input.dtype))
        low = _rows(dropped).mm(cast_a.t())
        ctx.save_for_backward(input, weight, a, b, cast_a, cast_b, low, mask)
        ctx.scaling, ctx.dropout = scaling, dropout
        y = _add_product(F.linear(input, weight, bias), low, cast_b, scaling)
        # With more dimensions, y is a view, and autograd would refuse later in-place operations (nn.ReLU(inplace=True),
        # y += x) on a view from a custom function.
        result: Tensor = y if y.dim() == 2 else torch.ops.aten._unsafe_view(y, y.shape)
        return result

    @staticmethod
    def backward(ctx: _Context, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, full_a, full_b, a, b, low, mask = ctx.saved_tensors
        gradient, x, scaling = _rows(grad_output), _rows(input), ctx.scaling
        is_differentiated = torch.is_grad_enabled()  # by a second derivative (create_graph=True)
        if is_differentiated:
            a, b = full_a.to(input.dtype), full_b.to(input.dtype)
        grad_low = gradient.mm(b)
        if scaling != 1:
            grad_low = grad_low * scaling
        grad_input = gradient.mm(weight) if ctx.needs_input_grad[0] else None
        if mask is not None:
            grad_dropped = None if grad_input is None else grad_low.mm(a)
            x, grad_dropped = _dropout_again(x, grad_dropped, _rows(mask), ctx.dropout)
            if grad_input is not None and grad_dropped is not None:
                grad_input += grad_dropped
        elif grad_input is not None:
            grad_input = grad_input.addmm_(grad_low, a)
        if is_differentiated:
            low = x.mm(a.t())  # h as a function of x and A, not as a saved number
        if scaling != 1:
            low = low * scaling
        if grad_input is not None:
            grad_input = grad_input.view_as(input)
        grad_a, grad_b = _product(grad_low.t(), x, full_a.dtype), _product(gradient.t(), low, full_b.dtype)
        grad_bias = gradient.sum(0) if ctx.needs_input_grad[2] else None
        return grad_input, None, grad_bias, grad_a, grad_b, None, None


def _applies(input: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> bool:
    """Return whether the hand-written backward pass can replace the plain operations."""
    return (
        torch.is_grad_enabled()
        and a.requires_grad
        and b.requires_grad
        and not weight.requires_grad
        and input.dtype == weight.dtype
        and type(input) in _PLAIN
        and type(weight) in _PLAIN
        and not torch._C._is_any_autocast_enabled()
        and not is_transformed()
    )


def _product(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the product of two matrices in `dtype`. CUDA adds up half precision in float32 without rounding."""
    is_half = first.is_cuda and first.dtype in (torch.bfloat16, torch.float16) and torch.version.hip is None
    if is_half and dtype == torch.float32 and not torch.is_grad_enabled():
        return torch.mm(first, second, out_dtype=dtype)
    return first.mm(second).to(dtype)


def _dropout(input: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return the result of `F.dropout`, for the same random numbers, and the mask of the elements that are kept."""
    if not input.is_cpu:
        return torch.native_dropout(input, p, True)
    mask = torch.empty_like(input, dtype=torch.bool).bernoulli_(1 - p)
    return _scales(mask, input.dtype, p).mul_(input), mask


def _dropout_again(x: Tensor, grad: Tensor | None, mask: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """Return the result of dropout with this mask, and the gradient of x for that of the result, in place."""
    if not mask.is_cpu:
        backward = torch.ops.aten.native_dropout_backward
        return backward(x, mask, 1 / (1 - p)), grad if grad is None else backward(grad, mask, 1 / (1 - p))
    scales = _scales(mask, x.dtype, p)
    return x * scales, grad if grad is None else grad.mul_(scales)


def _scales(mask: Tensor, dtype: torch.dtype, p: float) -> Tensor:
    """Return mask / (1 - p) as numbers, by which a CPU multiplies faster than by booleans."""
    return mask.view(torch.uint8).to(dtype).div_(1 - p)


def _add_product(y: Tensor, low: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Add s h Bᵀ to y in place, without another pass over the activations."""
    if y.dim() == 2:
        return y.addmm_(low, b.t(), alpha=scaling)
    y = y.contiguous()
    y.view(-1, y.shape[-1]).addmm_(_rows(low), b.t(), alpha=scaling)
    return y


_PLAIN = (Tensor, nn.Parameter)


def _rows(tensor: Tensor) -> Tensor:
    """Return (..., features) as (rows, features)."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
