"""Frozen norm layers: running statistics that stay what they are in every mode.

A BatchNorm layer in training mode changes its running mean and variance, whether or not its parameters are frozen, and
normalises with the batch instead of with them. A frozen one is the same layer, its class swapped for a subclass that
stays in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_FROZEN: dict[type[nn.Module], type[nn.Module]] = {}


class FrozenStatistics:
    """Mixed into the class of a norm layer: `train()` leaves it in evaluation mode."""

    training: bool
    was_training: bool

    def train(self, mode: bool = True) -> Any:
        self.was_training = mode
        self.training = False
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: a copy or an unpickled object has to make it again.
        return _rebuild, (type(self).__mro__[2],), self.__dict__


def freeze_statistics(module: nn.Module, but: Iterable[nn.Module] = ()) -> None:
    """Freezes every norm layer of `module` that keeps running statistics, but those inside the modules `but`."""
    left_alone = {layer for other in but for layer in other.modules()}
    for layer in module.modules():
        if layer not in left_alone and isinstance(layer, _NormBase) and layer.running_mean is not None:
            mode = layer.training
            object.__setattr__(layer, "__class__", _frozen_class(type(layer)))
            layer.train(mode)


def thaw_statistics(module: nn.Module) -> None:
    """Undoes `freeze_statistics`: each layer is in the mode that the module was last put in."""
    for layer in module.modules():
        if isinstance(layer, FrozenStatistics):
            mode = layer.was_training
            del layer.was_training
            layer.__class__ = type(layer).__mro__[2]
            assert isinstance(layer, nn.Module)
            layer.train(mode)


def _frozen_class(plain: type[nn.Module]) -> type[nn.Module]:
    if plain not in _FROZEN:
        _FROZEN[plain] = type(f"Frozen{plain.__name__}", (FrozenStatistics, plain), {})
    return _FROZEN[plain]


def _rebuild(plain: type[nn.Module]) -> nn.Module:
    frozen = _frozen_class(plain)
    return frozen.__new__(frozen)
