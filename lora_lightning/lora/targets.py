"""Describes the weights that can be adapted, and those that are."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_lightning.lora.adapter import Adapter, Adapters, AnyKind, Layout
from lora_lightning.lora.layers import adapters_of, no_weight, stored


@dataclass(frozen=True)
class Target:
    """Describes a weight that can be adapted, or is.

    Attributes:
        layer_name: Dotted name of the layer, `""` for the module itself.
        layer: The layer.
        parameter: Name of the weight in the layer, `""` for a bypass.
        kind: The kind of the layer.
        rank: Rank of the adapter.
        sizes: (out, in) of a bypass.
    """

    layer_name: str
    layer: nn.Module
    parameter: str
    kind: AnyKind
    rank: int = 0
    sizes: tuple[int, int] = (0, 0)

    @property
    def key(self) -> str:
        """Return the state-dict key of the weight."""
        return f"{self.layer_name}.{self.parameter}".strip(".")

    @property
    def name(self) -> str:
        """Return the name that patterns match: that of the layer, or of a weight that a module reads."""
        return self.key if self.kind.is_reader else self.layer_name

    @property
    def names(self) -> tuple[str, str]:
        """Return all names that patterns are matched with."""
        return self.name, self.layer_name

    @property
    def layout(self) -> Layout:
        """Return the layout of the weight."""
        return self.kind.layout(self.layer, self.parameter)

    @property
    def weight(self) -> Tensor | None:
        """Return W as it is stored, or `None` for a bypass."""
        return stored(self.layer, self.parameter) if self.parameter else None

    def dense_weight(self) -> Tensor:
        """Return W as a plain tensor. For a bypass, these are zeros that take no memory."""
        if not self.parameter:
            return no_weight(self.layer).expand(self.sizes)
        return self.kind.dense(self.layer, stored(self.layer, self.parameter))

    def outline(self) -> Tensor:
        """Return a tensor on meta with the shape and dtype of W."""
        if not self.parameter:
            return self.dense_weight().to("meta")
        weight = stored(self.layer, self.parameter)
        return torch.empty(self.kind.shape(self.layer, weight), dtype=weight.dtype, device="meta")

    @property
    def shape(self) -> tuple[int, int]:
        """Return (out, in), the shape of W as a matrix, or of the matrix of one expert."""
        *_, rows, columns = self.layout.matrix(self.outline()).shape
        return rows, columns


@dataclass(frozen=True)
class AdaptedWeight(Target):
    """Describes an adapted weight and one of its adapters.

    Attributes:
        adapter_name: Name of the adapter.
        adapter: The adapter.
    """

    adapter_name: str = field(kw_only=True)
    adapter: Adapter = field(kw_only=True)

    @property
    def adapters(self) -> Adapters:
        """Return all adapters of the weight."""
        return adapters_of(self.layer, self.parameter)

    @property
    def is_trained(self) -> bool:
        """Return whether the adapter is trained, and not frozen or inactive."""
        return self.adapter_name in self.adapters.trained

    @property
    def title(self) -> str:
        """Return the name of the weight, with that of the adapter in brackets if several of them are active."""
        return self.name if len(self.adapters.active) < 2 else f"{self.name} ({self.adapter_name})"

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Return the trained parameters A and B, of the shapes that `Adapter` describes."""
        return self.adapter.lora_A, self.adapter.lora_B
