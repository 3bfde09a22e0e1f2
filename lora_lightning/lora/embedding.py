"""Adapts embeddings."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.layers import LAYERS, LoRALayer


class LoRAEmbedding(LoRALayer):
    """Adapts `nn.Embedding`, where x is a one-hot vector. A is zero at `padding_idx`, so this vector does not change."""

    lora_names = ("lora_embedding_A", "lora_embedding_B")
    lora_transposed = True
    lora_draw = staticmethod(partial(nn.init.uniform_, a=-1, b=1))  # as the sum over a one-hot input has a single term
    padding_idx: int | None
    sparse: bool

    @classmethod
    def lora_refusal(cls, layer: nn.Module, weight: Tensor, config: LoRAConfig) -> str | None:
        rewrites = layer.max_norm is not None or layer.scale_grad_by_freq
        return "has max_norm or scale_grad_by_freq, which change the weight or its gradient" if rewrites else None

    def lora_create(self, weight: Tensor, rank: int, scaling: float, config: LoRAConfig) -> None:
        super().lora_create(weight, rank, scaling, config)
        if self.padding_idx is not None:
            self.get_parameter("lora_embedding_A").data[:, self.padding_idx] = 0

    def lora_base(self, input: Tensor) -> Tensor:
        return F.embedding(input, self._parameters["weight"], self.padding_idx, sparse=self.sparse)  # type: ignore[arg-type]

    def lora_path(self, input: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.embedding(input, a.t(), self.padding_idx), b)


LAYERS[nn.Embedding] = LoRAEmbedding
