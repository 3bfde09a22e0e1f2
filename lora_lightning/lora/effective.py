"""Weights that are read instead of called, and the classes that adapted modules are swapped for.

Some modules take a weight and compute with it themselves: `nn.MultiheadAttention` and `nn.LSTM` their own,
`nn.TransformerEncoderLayer` those of its linear layers. A side path would be passed by there. Such a weight is a property
of the swapped-in class that gives W + ΔW; the parameter stays in `_parameters`, under its own name.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.update import LowRankUpdate

_ONLY_LOOKED_AT = {"device", "dtype", "shape", "ndim", "size", "dim", "numel", "requires_grad", "is_cuda"}


Recipe = tuple[type[nn.Module], type[LowRankUpdate] | None, tuple[str, ...]]
_MADE: dict[Recipe, type[nn.Module]] = {}


class Adapted:
    """Mixed into classes that are made at run time, which copies and unpickled objects have to make again."""

    lora_recipe: Recipe

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, self.lora_recipe, self.__getstate__()


class AdaptedRecurrent:
    """Mixed into adapted `nn.LSTM`, `nn.GRU` and `nn.RNN`, which keep a list of their weights."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor]) -> None:
        """Nothing is kept: the list above is made of the weights in effect, each time."""

    def _update_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Weights in effect are not parameters, of which one block of memory could be made."""


def effective(update: LowRankUpdate, weight: Tensor) -> Tensor:
    """W + ΔW, or W while the adapter is off."""
    if torch.compiler.is_compiling():
        return torch.where(update.lora_gate > 0, update.lora_weight_in_effect(weight), weight)
    return update.lora_weight_in_effect(weight) if update.lora_active else weight


def adapted_class(
    plain: type[nn.Module], side_path: type[LowRankUpdate] | None, read: tuple[str, ...]
) -> type[nn.Module]:
    """The class to swap `plain` for.

    Args:
        plain: The module's own class.
        side_path: What its `forward` becomes, for example `LoRALinear`; `None` leaves it as it is.
        read: Names of the parameters that are read, and so have to be W + ΔW.
    """
    if side_path is not None and plain in side_path.__bases__ and not read:
        return side_path
    recipe = plain, side_path, read
    if recipe not in _MADE:
        mixins: list[type] = [Adapted, *([side_path] if side_path else [])]
        if issubclass(plain, nn.RNNBase):
            mixins.append(AdaptedRecurrent)
        properties = {name: _weight_of_layer if side_path and name == "weight" else _parameter(name) for name in read}
        _MADE[recipe] = type(f"LoRA{plain.__name__}", (*mixins, plain), {**properties, "lora_recipe": recipe})
    return _MADE[recipe]


def plain_class(adapted: type[nn.Module]) -> type[nn.Module]:
    """The class that `adapted` stands in for."""
    if issubclass(adapted, Adapted):
        return adapted.lora_recipe[0]
    plain = adapted.__bases__[-1]
    assert issubclass(plain, nn.Module)
    return plain


def read_in_code(classes: Iterator[type]) -> set[tuple[str, str]]:
    """Pairs of a child's name and a parameter's that code of these classes reads, as `self.out_proj.weight` does.

    Code that only sets up (`__init__`, `reset_parameters`, `init_weights`) does not count, nor reading a dtype.
    """
    return set().union(*(_read_in_class(cls) for cls in set(classes)))


@functools.cache
def _read_in_class(cls: type) -> frozenset[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for base in cls.__mro__:
        if base in (object, nn.Module) or base.__module__.startswith("lightning."):
            continue
        for name, member in vars(base).items():
            if "init" in name or "reset" in name:
                continue
            function: Any = member.fget if isinstance(member, property) else member
            code = getattr(inspect.unwrap(function), "__code__", None)
            if isinstance(code, CodeType):
                found.update(_read_in_function(code))
    return frozenset(found)


def _read_in_function(code: CodeType) -> Iterator[tuple[str, str]]:
    chain: list[str] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain.append(instruction.argval)
            continue
        yield from _read_in_chain(chain)
        chain = []
    yield from _read_in_chain(chain)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _read_in_function(constant)


def _read_in_chain(chain: list[str]) -> Iterator[tuple[str, str]]:
    for child, parameter, after in zip(chain, chain[1:], [*chain[2:], ""], strict=False):
        if after not in _ONLY_LOOKED_AT:
            yield child, parameter


def _parameter(name: str) -> property:
    def read(self: nn.Module) -> Tensor:
        update, weight = self._modules[f"lora_{name}"], self._parameters[name]
        assert isinstance(update, LowRankUpdate)
        assert weight is not None
        return effective(update, weight)

    return property(read)


def _read_weight_of_layer(self: LowRankUpdate) -> Tensor:
    weight = self._parameters["weight"]
    assert weight is not None
    if self.lora_dropout and self.training and self.lora_active:
        raise RuntimeError(
            f"The weight of an adapted {plain_class(type(self)).__name__} is read, not called, where its adapter's dropout "
            f"of {self.lora_dropout:g} can't be applied. Use dropout=0."
        )
    return effective(self, weight)


_weight_of_layer = property(_read_weight_of_layer)


def _rebuild(plain: type[nn.Module], side_path: type[LowRankUpdate] | None, read: tuple[str, ...]) -> nn.Module:
    cls = adapted_class(plain, side_path, read)
    return cls.__new__(cls)
