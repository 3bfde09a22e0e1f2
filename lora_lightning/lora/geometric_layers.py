"""Adapts the linear layer of PyTorch Geometric, which is not a subclass of PyTorch's."""

from __future__ import annotations

from lora_lightning.lora.fused import FusedLoRALinear
from lora_lightning.lora.layers import LAYERS
from lora_lightning.lora.weight_access import StoredState


class LoRAGeometricLinear(StoredState, FusedLoRALinear):
    """Adapts `torch_geometric.nn.Linear`, which computes as `nn.Linear` and saves the weight that it reads."""


LAYERS["torch_geometric", "Linear"] = LoRAGeometricLinear
