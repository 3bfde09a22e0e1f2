"""Adapts weights that a module reads itself instead of calling a layer. Reading such a weight returns the effective weight.

Examples are `nn.MultiheadAttention`, `nn.LSTM`, and subclasses of layers with their own `forward`. The adapter is a submodule
`lora_<parameter>` of the module. `experts.py` adapts any other parameter by name in the same way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.layers import LAYERS, LoRALayer, compose, mixins_of


class StoredState(nn.Module):
    """Mixin for modules that may save the weights that they read: the state dict contains the stored weights and the adapter."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self._parameters.items():
            if value is not None:
                destination[prefix + name] = value if keep_vars else value.detach()


class AdaptedParameter(LoRALayer):
    """Holds the adapter of a parameter of any module."""

    lora_is_inside = True
    lora_weights: tuple[str, ...] = ()
    """Beginnings of the names of weights that are adapted by default."""
    lora_mixins: tuple[type, ...] = (StoredState,)
    """Mixins of the class of the module that reads the weights."""

    @classmethod
    def lora_find(cls, layer: nn.Module, wanted: list[str]) -> dict[str, type[LoRALayer]]:
        if isinstance(layer, torch.jit.ScriptModule):  # its class cannot be replaced
            return {}
        keys = [key for key, value in layer._parameters.items() if value is not None]
        return {key: cls for key in keys if key in wanted or key.startswith(cls.lora_weights)}

    @classmethod
    def lora_place(cls, layer: nn.Module, parameter: str, variants: tuple[type, ...]) -> LoRALayer:
        adapter = cls().train(layer.training)
        if variants:
            compose(adapter, *variants)
        compose(layer, *dict.fromkeys((*cls.lora_mixins, *mixins_of(layer), parameter)))
        layer.add_module(f"lora_{parameter}", adapter)
        return adapter

    @classmethod
    def lora_refusal(cls, layer: nn.Module, weight: Tensor, config: LoRAConfig) -> str | None:
        if config.dropout:
            return f"uses its weight directly, so dropout={config.dropout} cannot be applied: use dropout=0"
        if isinstance(layer, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            return f"is in a {type(layer).__name__}, which would treat the adapter as one of its modules"
        return None


class OwnWeight(AdaptedParameter):
    """Adapts a subclass of a supported layer with its own `forward`."""

    lora_weights = ("weight",)


class AttentionWeight(AdaptedParameter):
    """Adapts an input projection of `nn.MultiheadAttention`."""

    lora_weights = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Recurrent:
    """Mixin for adapted recurrent modules. They keep a list of their weights, which is rebuilt for each use."""

    _flat_weights_names: list[str]
    _parameters: dict[str, Tensor]

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor]) -> None:
        # The plain class reads this attribute after the adapters are removed.
        vars(self)["_flat_weights"] = [self._parameters[name] for name in self._flat_weights_names]

    def flatten_parameters(self) -> None:
        """Do nothing, since effective weights are not parameters in one block of memory."""


class RecurrentWeight(AdaptedParameter):
    """Adapts a weight of `nn.LSTM`, `nn.GRU` or `nn.RNN`."""

    lora_weights = ("weight_",)
    lora_mixins = (StoredState, Recurrent)


class CellWeight(AdaptedParameter):
    """Adapts a weight of `nn.LSTMCell`, `nn.GRUCell` or `nn.RNNCell`."""

    lora_weights = ("weight_",)


_KINDS: dict[Any, type[LoRALayer]] = {
    "own forward": OwnWeight,
    nn.MultiheadAttention: AttentionWeight,
    nn.RNNBase: RecurrentWeight,
    nn.RNNCellBase: CellWeight,
}
LAYERS.update(_KINDS)
