"""Adapts parameters by name. A parameter with three dimensions holds a matrix per expert and gets one adapter per expert.

Version 5 of the transformers library stores the experts of a mixture in this way. PEFT calls the option `target_parameters` as well.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.layers import LAYERS, LoRALayer, full_precision
from lora_lightning.lora.low_rank import low_rank_factors
from lora_lightning.lora.weight_access import AdaptedParameter, StoredState


class ReadOnce:
    """Mixin for modules that hold experts. It computes the effective weights once per forward pass.

    Otherwise, a module that reads its parameter once per expert would compute the weights of all experts each time.
    """

    _modules: dict[str, nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        children = self._modules.items()
        experts = {key: each for key, each in children if isinstance(each, ExpertsParameter) and each.lora_active}
        for key, each in experts.items():
            object.__setattr__(each, "lora_kept", getattr(self, key.removeprefix("lora_")))
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc] # the plain class comes next
        finally:
            for each in experts.values():
                object.__setattr__(each, "lora_kept", None)


class ExpertsParameter(AdaptedParameter):
    """Holds one adapter per expert of a parameter of shape (experts, out, in).

    `lora_A` is of shape (r, experts, in), `lora_B` of shape (out, r, experts); expert e adds s B[:, :, e] A[:, e].
    """

    lora_mixins = (StoredState, ReadOnce)
    lora_kept: Tensor | None = None

    # The A of each expert has the distribution of a linear layer's A.
    lora_draw: Any = staticmethod(lambda a: nn.init.kaiming_uniform_(a.flatten(0, 1), a=math.sqrt(5)))

    @staticmethod
    def lora_reshape(a: Tensor, b: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        experts = len(weight)
        return a[:, None].repeat(1, experts, 1), b[:, :, None].repeat(1, 1, experts)

    @classmethod
    def lora_shape(cls, layer: nn.Module, weight: Tensor) -> tuple[int, ...]:
        """Return the shape (out, in) of the matrix of one expert."""
        shape = tuple(weight.shape[1:])
        return shape[::-1] if cls.lora_transposed else shape

    @classmethod
    def lora_refusal(cls, layer: nn.Module, weight: Tensor, config: LoRAConfig) -> str | None:
        if config.variants:
            return "contains one matrix per expert, for which only plain LoRA is supported: use neither DoRA nor PiSSA"
        return super().lora_refusal(layer, weight, config)

    def lora_delta_weight(self, weight: Tensor) -> Tensor:
        """Return s B A of all experts, in the shape of `weight`."""
        a, b = self.lora_factors()
        with full_precision(a):
            delta = b.permute(2, 0, 1) @ a.transpose(0, 1) * self.lora_scaling
        return delta.mT if self.lora_transposed else delta

    def lora_effective_weight(self, weight: Tensor) -> Tensor:
        return super().lora_effective_weight(weight) if self.lora_kept is None else self.lora_kept

    @classmethod
    def lora_best_factors(cls, change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return A and B in their stored shapes, such that their products best approximate the matrices of `change`."""
        pairs = [low_rank_factors(matrix, rank) for matrix in (change.mT if cls.lora_transposed else change)]
        return torch.stack([a for a, _ in pairs], dim=1), torch.stack([b for _, b in pairs], dim=2)


class TransposedExpertsParameter(ExpertsParameter):
    """Holds one adapter per expert of a parameter of shape (experts, in, out), as in GPT-OSS."""

    lora_transposed = True


class NamedParameter(AdaptedParameter):
    """Adapts the parameters that `target_parameters` selects in any module."""

    @classmethod
    def lora_find(cls, layer: nn.Module, wanted: list[str]) -> dict[str, type[LoRALayer]]:
        found = super().lora_find(layer, wanted)
        if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
            return found
        kind = TransposedExpertsParameter if getattr(layer, "is_transposed", False) else ExpertsParameter
        return {key: kind if layer.get_parameter(key).dim() == 3 else own for key, own in found.items()}


LAYERS[nn.Module] = NamedParameter
