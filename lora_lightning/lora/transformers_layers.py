"""Adapts layers of the transformers library that differ from PyTorch's, and defines `target_modules="all"` for its models."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from lora_lightning.lora.config import LoRAConfig, Names
from lora_lightning.lora.embedding import LoRAEmbedding
from lora_lightning.lora.layers import LAYERS, LoRALayer, LoRALinear
from lora_lightning.lora.model import EXTENSIONS, AdaptedWeight
from lora_lightning.wording import some_of


class LoRATransposedLinear(LoRALinear):
    """Adapts `Conv1D`, a linear layer whose weight has the shape (in, out)."""

    lora_transposed = True

    def lora_base(self, input: Tensor) -> Tensor:
        weight, bias = cast(Tensor, self._parameters["weight"]), cast(Tensor, self.bias)
        y = torch.addmm(bias, input.view(-1, input.shape[-1]), weight)
        return y.view(*input.shape[:-1], weight.shape[1])


class LoRAFalconLinear(LoRALinear):
    """Adapts Falcon's linear layer, which adds the bias in a separate operation."""

    def lora_base(self, input: Tensor) -> Tensor:
        y = input @ cast(Tensor, self._parameters["weight"]).T
        return y if self.bias is None else y + cast(Tensor, self.bias)


class LoRAScaledEmbedding(LoRAEmbedding):
    """Adapts an embedding that multiplies its output by `embed_scale`, as in Gemma and BART."""

    def lora_base(self, input: Tensor) -> Tensor:
        return super().lora_base(input) * self._lora_scale()

    def lora_path(self, input: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return super().lora_path(input, a, b) * self._lora_scale()

    def _lora_scale(self) -> Tensor | float:
        scale, weight = cast("Tensor | float", self.embed_scale), cast(Tensor, self._parameters["weight"])
        return scale.to(weight.dtype) if isinstance(scale, Tensor) else scale


LAYERS["transformers", "Conv1D"] = LoRATransposedLinear
LAYERS["transformers", "FalconLinear"] = LoRAFalconLinear


def kind_with_own_forward(layer: nn.Module) -> type[LoRALayer]:
    """Return the adapter class for a layer with its own `forward`, which is tried out if it may be a scaled embedding."""
    return LoRAScaledEmbedding if _multiplies_by_scale(layer) else LAYERS["own forward"]


def _multiplies_by_scale(layer: nn.Module) -> bool:
    """Return whether a layer returns rows of its weight times `embed_scale`, for a small weight and a scale of 3."""
    cls, plain = type(layer), nn.Embedding
    if not isinstance(layer, plain) or not hasattr(layer, "embed_scale") or "forward" in layer.__dict__:
        return False
    if cls._save_to_state_dict is not plain._save_to_state_dict or layer._modules:
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


def left_out_of_all(hosts: Iterable[nn.Module], known: Mapping[str, AdaptedWeight], config: LoRAConfig) -> set[str]:
    """Return the weights that `target_modules="all"` excludes in models of the transformers library: all but PEFT's `all-linear`.

    These are the non-linear layers and the output head. A log line names them.

    Args:
        hosts: The models.
        known: The weights that can be adapted, by name.
        config: Its `target_parameters` are not excluded.
    """
    inside: set[nn.Module] = set()
    heads: set[nn.Module | None] = set()
    for host in hosts:
        if any(cls.__module__.startswith("transformers.") for cls in type(host).__mro__):
            inside |= set(host.modules())
            heads.add(host.get_output_embeddings())  # type: ignore[operator]
    by_name = Names(config.target_parameters)
    left_out = [
        name
        for name, each in known.items()
        if each.layer in inside
        and (each.layer in heads or not (isinstance(each.layer, nn.Linear) or issubclass(each.kind, LoRALinear)))
        and config.selects(*each.names)
        and not by_name(name)
    ]
    if left_out:
        logging.getLogger("lora_lightning.lora").warning(
            "target_modules='all' selects the linear layers of a transformers model and excludes %s. Name these layers to adapt them.",
            some_of(left_out),
        )
    return set(left_out)


EXTENSIONS["all"] = left_out_of_all
EXTENSIONS["own forward"] = kind_with_own_forward
