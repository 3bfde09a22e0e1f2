"""Defines the adapted layers.

An adapted layer is the original object, whose class is replaced with a subclass that adds the output of an adapter:

    x ──┬── W, b (frozen) ───────────────┬── y = W x + b + s B A x
        └── dropout ── A ── B ── · s ────┘

The parameters of the base keep their names, so plain checkpoints can be loaded, and hooks and references survive. B A is only
computed to merge, or if code reads `layer.weight`, which returns W + s B A. W itself is `layer._parameters["weight"]`.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.config import LoRAConfig


class LoRALayer(nn.Module):
    """Holds the adapter of one weight, either as a mixin for the class of the layer or as a separate module inside the layer.

    W is treated as a matrix of shape (out, in). `lora_A` is A of shape (r, in), `lora_B` is B of shape (out, r), and the effective
    weight is W + s B A (https://arxiv.org/abs/2106.09685, equation 3). All names start with `lora_` to avoid conflicts.
    """

    lora_names = ("lora_A", "lora_B")
    lora_is_inside = False  # whether the adapter is a separate module in a layer that reads the effective weight
    lora_parameter = "weight"
    lora_transposed = False  # whether the weight is stored in the shape (in, out)
    lora_draw: Any = staticmethod(partial(nn.init.kaiming_uniform_, a=math.sqrt(5)))  # uniform within 1 / sqrt(in)
    lora_reshape: Any = staticmethod(lambda a, b, weight: (a, b))  # reshapes A and B to the shapes of the layer
    lora_is_packed = False  # whether only the layer can unpack its stored weight
    lora_dense: Any = staticmethod(lambda weight: dense(weight))  # returns W
    lora_shape: Any = classmethod(lambda cls, layer, w: cls.lora_matrix(torch.empty(w.shape, device="meta")).shape)
    lora_find: Any = classmethod(lambda cls, layer, wanted: {"weight": cls})  # adapter classes by parameter name
    lora_refusal: Any = staticmethod(lambda layer, weight, config: None)  # the reason why a weight cannot be adapted
    lora_scaling: float
    lora_dropout: float
    lora_active: bool
    lora_base: Callable[[Tensor], Tensor]  # W x + b
    lora_path: Callable[[Tensor, Tensor, Tensor], Tensor]  # B A x

    @classmethod
    def lora_place(cls, layer: nn.Module, parameter: str, variants: tuple[type, ...]) -> "LoRALayer":
        """Convert `layer` to an adapted layer and return the object that holds the adapter of its `parameter`."""
        compose(layer, *variants, cls, *mixins_of(layer), "weight")
        return cast(LoRALayer, layer)

    def lora_create(self, weight: Tensor, rank: int, scaling: float, config: LoRAConfig) -> None:
        """Create an untrained adapter for `weight` on the same device, in at least float32."""
        self.lora_scaling, self.lora_dropout, self.lora_active = scaling, config.dropout, True
        for name, factor in zip(self.lora_names, self.lora_start(weight, rank, config), strict=True):
            self.register_parameter(name, nn.Parameter(factor.to(weight.device)))

    def lora_start(self, weight: Tensor, rank: int, config: LoRAConfig) -> tuple[Tensor, Tensor]:
        """Return the initial values of A and B. They are drawn on the CPU, so a seed gives the same values on every device."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        rows, columns = self.lora_shape(self, weight)
        a, b = torch.empty(rank, columns, dtype=dtype, device="cpu"), torch.zeros(rows, rank, dtype=dtype, device="cpu")
        a, b = self.lora_reshape(a, b, weight)
        nn.init.normal_(a, std=1 / rank) if config.init == "gaussian" else self.lora_draw(a)
        return a, b

    @classmethod
    def lora_matrix(cls, weight: Tensor) -> Tensor:
        """Return `weight` as a matrix of shape (out, in)."""
        return weight.t() if cls.lora_transposed else weight.flatten(1)

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """Return the A and B of the update s B A."""
        return cast(tuple[Tensor, Tensor], tuple(self._parameters[name] for name in self.lora_names))

    @classmethod
    def lora_from_matrix(cls, matrix: Tensor, weight: Tensor) -> Tensor:
        """Reshape a matrix of shape (out, in) to the shape of `weight`."""
        return matrix.t() if cls.lora_transposed else matrix.view(weight.shape)

    def lora_delta_weight(self, weight: Tensor) -> Tensor:
        """Return s B A, in the shape of `weight` and the dtype of the adapter."""
        a, b = self.lora_factors()
        with full_precision(a):
            return self.lora_from_matrix((b.flatten(1) @ a.flatten(1)) * self.lora_scaling, weight)

    def lora_effective_weight(self, weight: Tensor) -> Tensor:
        """Return W + s B A, computed in the dtype of the adapter and rounded once to the dtype of `weight`."""
        base, delta = self.lora_dense(weight), self.lora_delta_weight(weight)
        return cast(Tensor, (base.to(delta.dtype) + delta).to(base.dtype))

    def lora_change(self, input: Tensor) -> Tensor:
        """Return s B A dropout(x), computed in the dtype of x."""
        a, b = self.lora_factors()
        if input.is_floating_point():  # A and B are small: casting them is cheaper than casting x
            a, b = a.to(input.dtype), b.to(input.dtype)
            if self.lora_dropout and self.training:
                input = F.dropout(input, self.lora_dropout)
        change = self.lora_path(input, a, b)
        return change if self.lora_scaling == 1 else change * self.lora_scaling

    def forward(self, input: Tensor) -> Tensor:
        output = self.lora_base(input)
        return output + self.lora_change(input).to(output.dtype) if self.lora_active else output

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Adapters stay in float32 when the base is converted, since optimizer steps are often too small for bfloat16.
        places: Any = (self._parameters, self._buffers)
        kept = [(place, key, place[key].data) for place in places for key in place if key.startswith("lora_")]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for place, key, data in kept:
            value = place[key]
            if value.dtype != (dtype := torch.promote_types(value.dtype, torch.float32)):
                value.data = data.to(value.device, dtype)
                value.grad = None if value.grad is None else value.grad.to(dtype)
        return self

    def extra_repr(self) -> str:
        rank = len(self.get_parameter(self.lora_names[0]))
        return f"{super().extra_repr()}, rank={rank}, scaling={self.lora_scaling:g}".removeprefix(", ")


class LoRALinear(LoRALayer):
    """Adapts `nn.Linear`: `y = x Wᵀ + b + s (x Aᵀ) Bᵀ` for x of shape (..., in)."""

    def lora_base(self, input: Tensor) -> Tensor:
        return F.linear(input, self._parameters["weight"], self.bias)  # type: ignore[arg-type]

    def lora_path(self, input: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.linear(input, a), b)


LAYERS: dict[Any, type[LoRALayer]] = {nn.Linear: LoRALinear}
"""Kinds of adapted layers, by the class of a layer, or by its package and name."""


def compose(layer: nn.Module, *mixins: type | str) -> None:
    """Replace the class of `layer` with a subclass of its plain class and `mixins`, or with the plain class if there are none.

    A string among the mixins is the name of a parameter. Code that reads this parameter gets the effective weight.
    """
    plain = getattr(layer, "lora_recipe", (type(layer),))[0]
    object.__setattr__(layer, "__class__", _composed((plain, *mixins)) if mixins else plain)


def mixins_of(layer: nn.Module) -> tuple[Any, ...]:
    """Return the mixins that `compose` added to the class of `layer`."""
    return getattr(layer, "lora_recipe", (None,))[1:]


@cache
def _composed(recipe: tuple[Any, ...]) -> Any:
    plain, *mixins = recipe
    members: dict[str, Any] = {name: _effective(name) for name in mixins if isinstance(name, str)}
    members |= {"lora_recipe": recipe, "lora_sharded_over": None}
    members |= {"__reduce_ex__": lambda self, _: (_new, (recipe,), self.__getstate__())}
    name = getattr(mixins[0], "lora_prefix", "LoRA") + plain.__name__
    ours = type(name, tuple(mixin for mixin in mixins if not isinstance(mixin, str)), {}).__mro__[1:]
    first = type(f"{name}Base", (plain,), {})  # Python replaces the class of an object only if the first bases agree
    return type(name, (first, *(cls for cls in ours if not issubclass(plain, cls)), plain), members)


def _new(recipe: tuple[Any, ...]) -> Any:  # recreates the class of copies and unpickled layers
    return _composed(recipe).__new__(_composed(recipe))


def _effective(name: str) -> property:
    def read(self: nn.Module) -> Tensor:
        adapter, weight = cast(LoRALayer, self._modules.get(f"lora_{name}", self)), cast(Tensor, self._parameters[name])
        stored = getattr(weight, "device_mesh", self) == self.lora_sharded_over  # fully_shard gets its parameter
        return adapter.lora_effective_weight(weight) if adapter.lora_active and not stored else weight

    return property(read)


def dense(weight: Tensor) -> Tensor:
    """Return `weight`, dequantized if it is one of torchao's quantized tensors."""
    plain = type(weight) in (Tensor, nn.Parameter) or not type(weight).__module__.startswith("torchao.")
    return weight if plain else weight.dequantize()


def full_precision(tensor: Tensor) -> Any:
    """Return a context without autocast on the device of `tensor`."""
    kind = tensor.device.type
    return torch.autocast(kind if _has_autocast(kind) else "cpu", enabled=False)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # PyTorch 2.10 cannot trace it
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)
