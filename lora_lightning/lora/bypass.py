"""The whole-network bypass: an adapter around a module, which needs no layer inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lightning.lora.update import LowRankUpdate


class LoRABypass(LowRankUpdate):
    """Mixed into a module's class: `y = f(x) + s B A flatten(x)`.

    For x of shape (batch, ...) with `in_features` numbers a sample, `lora_A` of shape (r, in_features) and `lora_B` of shape
    (out_features, r), with as many out_features as y has numbers a sample.
    """

    lora_A: Tensor
    lora_B: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        base = super().forward(*args, **kwargs)
        compiling = torch.compiler.is_compiling()
        if not compiling and not self.lora_active:
            return base
        input = args[0] if args else next(iter(kwargs.values()))
        sizes = (
            tuple(tensor[0].numel() for tensor in (input, base)) if isinstance(base, Tensor) else type(base).__name__
        )
        expected = self.lora_A.shape[1], self.lora_B.shape[0]
        if sizes != expected:
            raise ValueError(
                f"bypass={expected} does not fit: a sample of this module has {sizes} numbers in input and output. Give it "
                "the sizes of the flattened input and output."
            )
        low = input.flatten(1).to(self.lora_A.dtype)
        if self.lora_dropout and self.training:
            low = F.dropout(low, self.lora_dropout)
        change = F.linear(F.linear(low, self.lora_A), self.lora_B) * self.lora_scaling
        if compiling:
            change = change * self.lora_gate
        return base + change.view(base.shape).to(base.dtype)
