"""Adapts a whole module with a path around it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps

from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.adapter import Adapters, Forward, Kind
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.layers import child_name
from lora_lightning.lora.registry import kind_of
from lora_lightning.lora.targets import Target


class BypassKind(Kind[nn.Module]):
    """A module f with a path around it: `y = f(x) + s B A flatten(x)`, for x of shape (batch, ...).

    A is of shape (r, in_features) and B of shape (out_features, r), for the sizes of a flattened sample of x and y.
    """

    is_reader = False
    is_leaf = False

    def parameters(self, layer: nn.Module) -> list[str]:
        return []

    def refusal(self, layer: nn.Module, parameter: str, weight: Tensor, config: LoRAConfig) -> str | None:
        if config.lora_bias:
            return "has a bypass, which has no bias: leave out lora_bias"
        if kind_of(layer).is_reader:
            return None
        return f"is a {type(layer).__name__}, which gets its own adapter; a bypass is for a module that contains layers"

    def forward(self, plain: type[nn.Module]) -> Forward:
        plain_forward = plain.forward

        @wraps(plain_forward)
        def forward(self: nn.Module, *arguments: object, **keywords: object) -> Tensor:
            adapters = self._modules.get(child_name(""))
            output: Tensor = plain_forward(self, *arguments, **keywords)
            if not isinstance(adapters, Adapters):  # another thread has entered `bare`
                return output
            for adapter in adapters.in_effect.adapters:
                input = arguments[0] if arguments else next(iter(keywords.values()))
                assert isinstance(input, Tensor)
                a, b = adapter.factors()
                _check_sizes(input, output, a, b)
                x = input.flatten(1).to(a.dtype)
                if adapter.config.dropout and adapter.training:
                    x = F.dropout(x, adapter.config.dropout)
                change = F.linear(F.linear(x, a), b) * (adapter.scaling * adapter.strength)
                output = output + change.view(output.shape).to(output.dtype)
            return output

        return forward


class SequentialWithBypass:
    """Methods of an `nn.Sequential` with a bypass. The adapters are a child, but not one of the layers."""

    _modules: dict[str, nn.Module]

    def _layers(self) -> list[nn.Module]:
        return [layer for name, layer in self._modules.items() if name != child_name("")]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._layers())

    def __len__(self) -> int:
        return len(self._layers())


class SequentialBypassKind(BypassKind):
    """An `nn.Sequential` with a path around it."""

    mixin = SequentialWithBypass


_BYPASS, _SEQUENTIAL_BYPASS = BypassKind(), SequentialBypassKind()


def bypass_target(module: nn.Module, config: LoRAConfig) -> Target:
    """Return the target for `config.bypass`."""
    assert config.bypass is not None
    in_features, out_features = config.bypass
    kind = _SEQUENTIAL_BYPASS if isinstance(module, nn.Sequential) else _BYPASS
    return Target("", module, "", kind, rank=config.rank_of(""), sizes=(out_features, in_features))


def _check_sizes(input: Tensor, output: object, a: Tensor, b: Tensor) -> None:
    expected = a.shape[-1], len(b)
    sizes = (input[0].numel(), output[0].numel()) if isinstance(output, Tensor) else type(output).__name__
    if sizes != expected:
        raise ValueError(
            f"bypass={expected} does not fit this module: the flattened input and output of a sample have the sizes "
            f"{sizes}. Use these sizes."
        )
