"""The linear layers of bitsandbytes: `Linear4bit` (QLoRA, https://arxiv.org/abs/2305.14314) and `Linear8bitLt`.

This library comes without types, so the attributes of its layers are read by name.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.layers import Adapted, LinearKind


class PackedLinearKind(LinearKind):
    """A quantized linear layer, whose own forward pass computes W x + b.

    The parameter is packed, so `layer.weight` returns the stored tensor: only this layer can compute with it.
    """

    is_packed = True
    sizes = ()

    def refusal(self, layer: nn.Linear, parameter: str, weight: Tensor, config: LoRAConfig) -> str | None:
        return "is quantized by bitsandbytes, which lora_bias=True does not support" if config.lora_bias else None

    def shape(self, layer: nn.Linear, weight: Tensor) -> torch.Size:
        return torch.Size((layer.out_features, layer.in_features))

    def dense(self, layer: nn.Linear, weight: Tensor) -> Tensor:
        """Return the dequantized W, of shape (out, in)."""
        packed: Any = weight
        functional, own = sys.modules["bitsandbytes"].functional, vars(layer)
        if weight.is_floating_point():  # merged, or not quantized yet
            return weight.data
        if hasattr(layer, "quant_state"):
            state = getattr(packed, "quant_state", own.get("quant_state"))
            unpacked: Tensor = functional.dequantize_4bit(packed.data, state)
            return unpacked
        scales = own["state"].SCB if own["state"].SCB is not None else packed.SCB
        # The scales stay on the last device when the module moves to another one.
        dequantized: Tensor = functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device))
        return dequantized

    def base(self, layer: nn.Linear, weight: Tensor, input: Tensor) -> Tensor:
        assert isinstance(layer, Adapted)
        parameters = layer._parameters
        bias = parameters.get("bias")
        if type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point():  # merged
            return F.linear(input, weight.to(input.dtype), None if bias is None else bias.to(input.dtype))
        if bias is not None and bias.requires_grad:  # trained in full, in its own dtype
            parameters["bias"] = None
            try:
                unbiased: Tensor = layer.lora_plain.forward(layer, input)
                return unbiased + bias.to(unbiased.dtype)
            finally:
                parameters["bias"] = bias
        # The layer converts its bias in place to the compute dtype. A second tensor leaves the frozen bias unchanged.
        if bias is not None:
            parameters["bias"] = nn.Parameter(bias.detach(), requires_grad=False)
        try:
            output: Tensor = layer.lora_plain.forward(layer, input)
            return output
        finally:
            parameters["bias"] = bias


def keep_packing(module: nn.Module) -> None:
    """Prevent the 4-bit layers in `module` from packing their weights differently in evaluation.

    On CPUs with bfloat16 instructions (AVX512-BF16), `Linear4bit` does so in its first evaluation. Then no gradients
    flow through it, and what it restores for a state dict is another weight. The scales of a layer that was evaluated
    before were rounded to bfloat16.
    """
    for layer in module.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            state: Any = getattr(layer._parameters["weight"], "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                layer.state_dict()  # restores the packing, but not the scales if they are not nested
                if not state.nested:
                    state.absmax = state.absmax.t().flatten().float()
            vars(layer)["support_avx512bf16_for_cpu"] = False


def become_linear(layer: nn.Module, weight: Tensor) -> None:
    """Convert a quantized layer without adapters in place to `nn.Linear` with this weight, and keep its hooks.

    Those of the state dict are left out, since they are those of bitsandbytes.
    """
    out_features, in_features = weight.shape
    plain = nn.Linear(in_features, out_features, bias=False, device="meta")
    plain.train(layer.training)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    bias = layer._parameters.get("bias")
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=bias.requires_grad)
    of_both_passes = [key for key in vars(plain) if "hook" in key and "state_dict" not in key]
    layer.__dict__ = vars(plain) | {key: vars(layer)[key] for key in of_both_passes}
    object.__setattr__(layer, "__class__", nn.Linear)
