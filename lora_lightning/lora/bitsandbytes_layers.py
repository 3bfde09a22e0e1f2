"""Adapts the quantized linear layers of bitsandbytes: `Linear4bit` (QLoRA, https://arxiv.org/abs/2305.14314) and `Linear8bitLt`."""

from __future__ import annotations

import sys
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.layers import LAYERS, LoRALayer, LoRALinear, compose, mixins_of


class LoRABitsandbytesLinear(LoRALinear):
    """Adapts a quantized linear layer, whose own forward pass computes W x + b.

    The parameter is packed, so `layer.weight` returns the stored tensor: only this layer can compute with it.
    """

    lora_is_packed = True

    @classmethod
    def lora_place(cls, layer: nn.Module, parameter: str, variants: tuple[type, ...]) -> LoRALayer:
        keep_packing(layer)
        compose(layer, *variants, cls, *mixins_of(layer))
        return cast(LoRALayer, layer)

    @staticmethod
    def lora_shape(layer: Any, weight: Tensor) -> tuple[int, int]:
        return layer.out_features, layer.in_features

    def lora_base(self, input: Tensor) -> Tensor:
        parameters: dict[str, Any] = self._parameters
        weight, bias = parameters["weight"], parameters.get("bias")
        if _is_dense(weight):  # merged temporarily
            return F.linear(input, weight.to(input.dtype), None if bias is None else bias.to(input.dtype))
        # The layer converts its bias in place to the compute dtype. A second tensor leaves the frozen bias unchanged.
        parameters["bias"] = None if bias is None else bias.detach()
        try:
            return cast(Tensor, super(LoRALayer, self).forward(input))
        finally:
            parameters["bias"] = bias

    def lora_dense(self, weight: Tensor) -> Tensor:
        """Return the dequantized W, of shape (out, in)."""
        layer, functional = cast(Any, self), sys.modules["bitsandbytes"].functional
        if weight.is_floating_point():  # merged temporarily, or not quantized yet
            return weight.data
        if hasattr(layer, "quant_state"):
            packed = cast(Any, layer._parameters["weight"])
            state = getattr(packed, "quant_state", layer.quant_state)
            return cast(Tensor, functional.dequantize_4bit(packed.data, state))
        scales = layer.state.SCB if layer.state.SCB is not None else cast(Any, weight).SCB
        # The scales stay on the last device when the module moves to another one.
        return cast(Tensor, functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device)))

    def lora_from_matrix(self, matrix: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        return matrix


def keep_packing(module: nn.Module) -> None:
    """Prevent the 4-bit layers in `module` from packing their weights differently in evaluation.

    On CPUs with bfloat16 instructions (AVX512-BF16), `Linear4bit` does so in its first evaluation. Then no gradients flow through it, and
    what it restores for a state dict is another weight. The scales of a layer that was evaluated before were rounded to bfloat16.
    """
    layer: Any
    for layer in module.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            state: Any = getattr(layer._parameters["weight"], "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                layer.state_dict()  # restores the packing, but not the scales if they are not nested
                if not state.nested:
                    state.absmax = state.absmax.t().flatten().float()
            layer.support_avx512bf16_for_cpu = False


def _is_dense(weight: Tensor) -> bool:
    return type(weight) is nn.Parameter and weight.is_floating_point()


def become_linear(layer: nn.Module, weight: Tensor) -> None:
    """Convert a quantized layer without adapters in place to `nn.Linear` with this weight. Forward hooks are kept."""
    quantized = cast(Any, layer)
    plain = nn.Linear(quantized.in_features, quantized.out_features, bias=False, device="meta")
    plain.train(layer.training)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if quantized.bias is not None:
        plain.bias = nn.Parameter(quantized.bias.to(weight.dtype), requires_grad=False)
    hooks = {key: value for key, value in vars(layer).items() if key.endswith("forward_hooks")}
    layer.__dict__ = vars(plain) | hooks
    object.__setattr__(layer, "__class__", nn.Linear)


LAYERS["bitsandbytes", "Linear4bit"] = LoRABitsandbytesLinear
LAYERS["bitsandbytes", "Linear8bitLt"] = LoRABitsandbytesLinear
