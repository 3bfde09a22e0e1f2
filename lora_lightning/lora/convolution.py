"""Adapts convolutions."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.layers import LAYERS, LoRALayer


class LoRAConv(LoRALayer):
    """Adapts a convolution by one to r channels, with A of shape (r, in / groups, *kernel), followed by one of kernel size 1 with B.

    The first one has the stride, padding and dilation of the layer. All groups share A and have separate rows of B.
    """

    @staticmethod
    def lora_reshape(a: Tensor, b: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return a.view(-1, *weight.shape[1:]), b.view(*b.shape, *(1 for _ in weight.shape[2:]))

    def lora_base(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self._parameters["weight"], self.bias)  # type: ignore[no-any-return, operator]

    def lora_path(self, input: Tensor, a: Tensor, b: Tensor) -> Tensor:
        groups = cast(int, self.groups)
        a = a if groups == 1 else a.repeat(groups, *(1 for _ in a.shape[1:]))
        low = self._conv_forward(input, a, None)  # type: ignore[operator]
        return {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[b.dim()](low, b, groups=groups)


LAYERS.update(dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), LoRAConv))
