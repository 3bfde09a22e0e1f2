"""Modules that read a weight themselves instead of calling a layer.

These are attention, recurrent modules, layers with a forward pass of their own, and any parameter by name, such as the
experts of a mixture. Reading such a weight returns the weight in effect, so the module computes with the adapter.
"""

from __future__ import annotations

from functools import wraps
from weakref import ref

import torch
from torch import Tensor, nn

from lora_lightning.lora.adapter import Adapters, Forward, Kind, L, Layout, this_thread
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.layers import is_computed, stored


class ReaderKind(Kind[L]):
    """A module that reads the weight in effect.

    The weights in effect are formed once per forward pass, since a module may read them several times, or once per
    expert.
    """

    def parameters(self, layer: L) -> list[str]:
        return []

    def refusal(self, layer: L, parameter: str, weight: Tensor, config: LoRAConfig) -> str | None:
        if config.lora_bias:
            return "reads its weight itself, so that lora_bias=True has no place there: leave it out"
        if config.dropout:
            return f"uses its weight directly, so dropout={config.dropout} cannot be applied: use dropout=0"
        if isinstance(layer, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            return f"is in a {type(layer).__name__}, which would treat the adapter as one of its modules"
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
            if layer.max_norm is not None or layer.scale_grad_by_freq:
                return "has max_norm or scale_grad_by_freq, which change the weight or its gradient"
            if layer.sparse:
                return "has sparse gradients, which cannot flow to an adapter: use sparse=False"
        return None

    def forward(self, plain: type[nn.Module]) -> Forward:
        plain_forward = plain.forward

        @wraps(plain_forward)
        def forward(self: nn.Module, *arguments: object, **keywords: object) -> Tensor:
            children = [child for child in list(self._modules.values()) if isinstance(child, Adapters)]
            thread = this_thread()
            reading = [child for child in children if child.in_effect.adapters and thread not in child.formed]
            for child in reading:
                child.formed[thread] = getattr(self, child.parameter)
            try:
                output: Tensor = plain_forward(self, *arguments, **keywords)
                return output
            finally:
                for child in reading:
                    child.formed.pop(thread, None)

        return forward


class OwnForwardKind(ReaderKind[nn.Module]):
    """A subclass of a supported layer with a forward pass of its own."""

    def parameters(self, layer: nn.Module) -> list[str]:
        if is_computed(layer, "weight") and hasattr(layer, "weight"):
            return ["weight"]
        return [name for name, value in layer._parameters.items() if value is not None and name.startswith("weight")]


class AttentionKind(ReaderKind[nn.MultiheadAttention]):
    """`nn.MultiheadAttention`, which reads the weights of its projections."""

    def parameters(self, layer: nn.MultiheadAttention) -> list[str]:
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return [name for name in names if _has(layer, name)]


class Recurrent:
    """Methods of adapted recurrent modules. They keep a list of their weights, which is made anew for each use."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor]) -> None:
        # The plain class reads this attribute after the adapters are removed.
        assert isinstance(self, nn.Module)
        plain = [stored(self, name) for name in self._flat_weights_names]
        vars(self)["_flat_weights"], vars(self)["_flat_weight_refs"] = plain, [ref(weight) for weight in plain]

    def __setattr__(self, name: str, value: object) -> None:
        assert isinstance(self, nn.Module)
        nn.Module.__setattr__(self, name, value)  # type: ignore[arg-type]  # the plain class would change its list

    def _replicate_for_data_parallel(self) -> nn.Module:
        assert isinstance(self, nn.Module)
        replica: nn.Module = nn.Module._replicate_for_data_parallel(self)  # type: ignore[no-untyped-call]
        return replica

    def _init_flat_weights(self) -> None:
        self._flat_weights = []  # not with weights in effect, whose parts may be on different devices meanwhile

    def _weights_have_changed(self) -> bool:
        return False  # no list has to be made again

    def flatten_parameters(self) -> None:
        """Do nothing, since weights in effect are not parameters in one block of memory."""


class RecurrentKind(ReaderKind[nn.RNNBase]):
    """`nn.LSTM`, `nn.GRU` and `nn.RNN`."""

    mixin = Recurrent

    def parameters(self, layer: nn.RNNBase) -> list[str]:
        return [name for name in layer._flat_weights_names if name.startswith("weight_")]


class CellKind(ReaderKind[nn.RNNCellBase]):
    """`nn.LSTMCell`, `nn.GRUCell` and `nn.RNNCell`."""

    def parameters(self, layer: nn.RNNCellBase) -> list[str]:
        return ["weight_ih", "weight_hh"]


class ParameterKind(ReaderKind[nn.Module]):
    """A parameter of any module, by name. One with three dimensions, but for convolutions, has one matrix per expert.

    Version 5 of the transformers library stores the experts of a mixture in this way. PEFT calls the option
    `target_parameters` as well.
    """

    is_leaf = False

    def layout(self, layer: nn.Module, parameter: str) -> Layout:
        if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d) or stored(layer, parameter).dim() != 3:
            return Layout()
        return Layout(experts=True, transposed=bool(getattr(layer, "is_transposed", False)))


def _has(layer: nn.Module, parameter: str) -> bool:
    return isinstance(getattr(layer, parameter, None), torch.Tensor)
