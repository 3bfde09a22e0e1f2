"""Adapts a whole module with a path around it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.layers import LoRALayer, compose, mixins_of
from lora_lightning.lora.model import EXTENSIONS, AdaptedWeight, kind_of


class LoRABypass(LoRALayer):
    """Adds to a module's output: `y = f(x) + s B A flatten(x)`, for x of shape (batch, ...).

    `lora_A` is of shape (r, in_features) and `lora_B` of shape (out_features, r), for the sizes of a flattened sample of x and y.
    """

    lora_parameter = ""
    lora_A: Tensor
    lora_B: Tensor

    @classmethod
    def lora_place(cls, layer: nn.Module, parameter: str, variants: tuple[type, ...]) -> LoRALayer:
        compose(layer, cls, *mixins_of(layer))
        return cast(LoRALayer, layer)

    @classmethod
    def lora_refusal(cls, layer: nn.Module, weight: Tensor, config: LoRAConfig) -> str | None:
        if kind_of(layer).lora_is_inside:
            return None
        return f"is a {type(layer).__name__}, which gets its own adapter; a bypass is for a module that contains layers"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        base = super(LoRALayer, self).forward(*args, **kwargs)
        if not self.lora_active:
            return base
        input = args[0] if args else next(iter(kwargs.values()))
        sizes = (
            tuple(tensor[0].numel() for tensor in (input, base)) if isinstance(base, Tensor) else type(base).__name__
        )
        expected = self.lora_A.shape[1], self.lora_B.shape[0]
        if sizes != expected:
            raise ValueError(
                f"bypass={expected} does not fit this module: the flattened input and output of a sample have the sizes {sizes}. "
                "Use these sizes."
            )
        x = input.flatten(1).to(self.lora_A.dtype)
        if self.lora_dropout and self.training:
            x = F.dropout(x, self.lora_dropout)
        change = F.linear(F.linear(x, self.lora_A), self.lora_B) * self.lora_scaling
        return base + change.view(base.shape).to(base.dtype)


class BypassWeight(AdaptedWeight):
    """Represents the weight that a bypass adapts: zeros of shape (out_features, in_features), which take no memory."""

    def __init__(self, module: nn.Module, config: LoRAConfig) -> None:
        super().__init__("", module, "", LoRABypass, config.rank_of(""))
        assert config.bypass is not None
        floating = (parameter for parameter in module.parameters() if parameter.is_floating_point())
        zero = next(floating, torch.zeros(())).detach().new_zeros(())
        self._weight = zero.expand(config.bypass[1], config.bypass[0])

    weight = property(lambda self: self._weight)


EXTENSIONS["bypass"] = lambda module, config: [BypassWeight(module, config)]
