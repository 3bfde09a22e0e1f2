"""Layers of transformers and PyTorch Geometric that compute like PyTorch's, but are not its classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.adapter import Adapters, Layout
from lora_lightning.lora.layers import Adapted, CalledKind, EmbeddingKind, FusedLinearKind, LinearKind, stored


class TransposedLinearKind(CalledKind[nn.Linear]):
    """`Conv1D` of transformers, a linear layer whose weight has the shape (in, out)."""

    def layout(self, layer: nn.Linear, parameter: str) -> Layout:
        return Layout(transposed=True)

    def base(self, layer: nn.Linear, weight: Tensor, input: Tensor) -> Tensor:
        y = torch.addmm(layer.bias, input.view(-1, input.shape[-1]), weight)
        return y.view(*input.shape[:-1], weight.shape[1])

    def low_rank(self, layer: nn.Linear, input: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.linear(input, a), b)


class FalconLinearKind(LinearKind):
    """The linear layer of Falcon, which adds the bias in a separate operation."""

    def base(self, layer: nn.Linear, weight: Tensor, input: Tensor) -> Tensor:
        y = input @ weight.T
        return y if layer.bias is None else y + layer.bias


class GeometricLinearKind(FusedLinearKind):
    """The linear layer of PyTorch Geometric."""

    sizes = ()


class ScaledEmbeddingKind(EmbeddingKind):
    """An embedding that multiplies its output by `embed_scale`, as in Gemma and BART."""

    def base(self, layer: nn.Embedding, weight: Tensor, input: Tensor) -> Tensor:
        return super().base(layer, weight, input) * _scale(layer, weight)

    def low_rank(self, layer: nn.Embedding, input: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return super().low_rank(layer, input, a, b) * _scale(layer, stored(layer, "weight"))


def _scale(layer: nn.Embedding, weight: Tensor) -> Tensor | float:
    scale: Tensor | float = getattr(layer, "embed_scale")  # noqa: B009  # the class of PyTorch has no such attribute
    return scale.to(weight.dtype) if isinstance(scale, Tensor) else scale


def multiplies_by_scale(layer: nn.Module) -> bool:
    """Return whether a layer returns rows of its weight times `embed_scale`, for a small weight and a scale of 3."""
    cls, plain = layer.lora_plain if isinstance(layer, Adapted) else type(layer), nn.Embedding
    if not isinstance(layer, plain) or not hasattr(layer, "embed_scale") or "forward" in layer.__dict__:
        return False
    has_children = any(not isinstance(child, Adapters) for child in layer._modules.values())
    if cls._save_to_state_dict is not plain._save_to_state_dict or has_children:
        return False
    if layer._parameters.keys() != {"weight"} or not layer._buffers.keys() <= {"embed_scale"}:
        return False  # it may replace some of the rows
    weight = torch.linspace(-1, 1, 6, dtype=torch.float32, device="cpu").view(3, 2)
    ids = torch.tensor([[0, 2], [1, 2]], device="cpu")
    tried = cls.__new__(cls)
    tried.__dict__.update(layer.__dict__, _parameters={"weight": weight}, _buffers=dict(layer._buffers))
    if "embed_scale" in tried._buffers:
        tried._buffers["embed_scale"] = torch.tensor(3.0, device="cpu")
    else:
        tried.__dict__["embed_scale"] = 3.0
    try:
        with torch.no_grad():
            output = cls.forward(tried, ids)
            return isinstance(output, Tensor) and torch.equal(output, weight[ids] * 3)
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False  # it needs other inputs, or more than a weight and a scale
