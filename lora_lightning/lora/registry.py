"""Says which kind serves which layer. A new type of layer is one class, and one line here."""

from __future__ import annotations

from types import MethodType

from torch import nn

from lora_lightning.lora.adapter import AnyKind
from lora_lightning.lora.layers import Adapted, ConvKind, EmbeddingKind, FusedLinearKind
from lora_lightning.lora.other_layers import (
    FalconLinearKind,
    GeometricLinearKind,
    ScaledEmbeddingKind,
    TransposedLinearKind,
    multiplies_by_scale,
)
from lora_lightning.lora.packed import PackedLinearKind
from lora_lightning.lora.readers import AttentionKind, CellKind, OwnForwardKind, ParameterKind, RecurrentKind

KINDS: dict[type[nn.Module], AnyKind] = {
    nn.Linear: FusedLinearKind(),
    nn.Conv1d: ConvKind(),
    nn.Conv2d: ConvKind(),
    nn.Conv3d: ConvKind(),
    nn.Embedding: EmbeddingKind(),
    nn.MultiheadAttention: AttentionKind(),
    nn.RNNBase: RecurrentKind(),
    nn.RNNCellBase: CellKind(),
}
"""The kinds by class. The nearest base class of a layer counts."""

KINDS_OF_OTHERS: dict[tuple[str, str], AnyKind] = {
    ("bitsandbytes", "Linear4bit"): PackedLinearKind(),
    ("bitsandbytes", "Linear8bitLt"): PackedLinearKind(),
    ("transformers", "Conv1D"): TransposedLinearKind(),
    ("transformers", "FalconLinear"): FalconLinearKind(),
    ("torch_geometric", "Linear"): GeometricLinearKind(),
}
"""The kinds by package and name, for classes of packages that may not be installed."""

BY_NAME = ParameterKind()
"""The kind of parameters that are selected by name."""

_OWN_FORWARD, _SCALED_EMBEDDING = OwnForwardKind(), ScaledEmbeddingKind()
_METHODS = ("forward", "_conv_forward", "_save_to_state_dict")
"""Methods that a subclass must not change to be served by the kind of its base class."""


def kind_of(layer: nn.Module) -> AnyKind:
    """Return the kind for a layer. A layer with a forward pass of its own reads its weight."""
    cls = layer.lora_plain if isinstance(layer, Adapted) else type(layer)
    for base in cls.__mro__:
        kind = KINDS.get(base) or KINDS_OF_OTHERS.get((base.__module__.split(".")[0], base.__name__))
        if kind is not None:
            break
    else:
        return BY_NAME
    same = all(getattr(cls, name, None) is getattr(base, name, None) for name in _METHODS)
    if kind.is_reader or (same and not _has_forward_of_its_own(layer)):
        return kind
    return _SCALED_EMBEDDING if multiplies_by_scale(layer) else _OWN_FORWARD


def _has_forward_of_its_own(layer: nn.Module) -> bool:
    """Return whether the object has another forward pass than its class, which a hook of accelerate calls."""
    method = vars(layer).get("_old_forward", vars(layer).get("forward"))
    return method is not None and not (isinstance(method, MethodType) and method.__func__ is type(layer).forward)
