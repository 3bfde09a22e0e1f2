"""The adapter of one weight.

    x ──┬── W, b (frozen) ───────────────┬── y = W x + b + s B A x
        └── dropout ── A ── B ── · s ────┘

Three classes share the work. `Layout` says how a weight holds the matrix W. `Kind` says how x flows through one type of
layer. `Adapter` holds A, B and s, and defines the update. A variant of LoRA is a subclass of `Adapter` and knows no
type of layer; a type of layer is a `Kind` and knows no variant. `Adapters` holds the adapters of one weight by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import RLock, get_ident
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Self, TypeAlias, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.config import LoRAConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    from lora_lightning.lora.layers import CalledKind

L = TypeVar("L", bound=nn.Module)
Forward = Callable[..., Tensor]
_lock = RLock()
"""Held while a context of some thread begins or ends, since each step depends on the contexts of the others."""


@dataclass(frozen=True)
class Layout:
    """Says how a weight holds the matrix W of shape (out, in), or one such matrix per expert.

    Attributes:
        transposed: Whether the weight has the shape (in, out).
        experts: Whether the weight has one matrix per expert, in its first dimension.
        one_hot: Whether x is a one-hot vector, as in an embedding. The sum A x then has a single term.
        zero_column: A column of A that stays zero, for the padding index of an embedding.
    """

    transposed: bool = False
    experts: bool = False
    one_hot: bool = False
    zero_column: int | None = None

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the view of shape (out, in), or (experts, out, in). The columns hold the kernel of a convolution."""
        if self.transposed:
            return weight.mT
        return weight if self.experts else weight.flatten(1)

    def weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Return a matrix in the shape of the weight."""
        return matrix.mT if self.transposed else matrix.view(shape)


class Kind(Generic[L]):
    """Describes one type of layer. This base class describes modules that read a weight instead of calling a layer.

    A kind has no state, and its methods are not on the layer, where they could hide a name of the user's class.

    Attributes:
        is_reader: Whether the module reads the weight in effect, W + ΔW. Otherwise the adapter has a path of its own.
        is_packed: Whether only the layer itself can compute with the stored weight.
        is_leaf: Whether torch.fx takes the layer as it is, since the module is one layer and not a network.
        sizes: Attributes of the layer that state the shape of the weight. They are read-only while it has adapters.
        mixin: Further methods of the class of adapted layers, if any.
    """

    is_reader: ClassVar[bool] = True
    is_packed: ClassVar[bool] = False
    is_leaf: ClassVar[bool] = True
    sizes: ClassVar[tuple[str, ...]] = ()
    mixin: ClassVar[type | None] = None

    def parameters(self, layer: L) -> list[str]:
        """Return the names of the parameters that are adapted by default."""
        return ["weight"]

    def layout(self, layer: L, parameter: str) -> Layout:
        """Return the layout of a parameter."""
        return Layout()

    def refusal(self, layer: L, parameter: str, weight: Tensor, config: LoRAConfig) -> str | None:
        """Return the reason why a weight cannot be adapted, if any."""
        return None

    def dense(self, layer: L, weight: Tensor) -> Tensor:
        """Return W as a plain tensor."""
        return dense(weight)

    def shape(self, layer: L, weight: Tensor) -> torch.Size:
        """Return the shape of W as a plain tensor."""
        return weight.shape

    def forward(self, plain: type[nn.Module]) -> Forward:
        """Return the forward pass for adapted layers of the class `plain`."""
        raise NotImplementedError


AnyKind: TypeAlias = Kind[Any]
"""A kind of whatever type of layer. It is `Any` since a list of kinds has no common type of layer."""


class Adapter(nn.Module):
    """Holds the update of one weight, W' = W + s B A (LoRA, https://arxiv.org/abs/2106.09685, equation 3).

    Args:
        weight: W as a plain tensor. It may be on meta unless `reads_weight`.
        layout: The layout of W.
        config: The configuration of the adapter.
        rank: Rank r, at most that of W.
        scaling: Scale s.
        device: The device of A and B.

    Attributes:
        lora_A: A of shape (r, in), in at least float32, or (r, experts, in) where the weight has experts.
        lora_B: B of shape (out, r), or (out, r, experts). It is zero initially, so an untrained adapter changes no bit.
        lora_bias: The bias c of B, of shape (out,), or `None`. The layer adds s c to its own bias.
        scaling: Scale s. It is that of the requested rank, even if the layer is too small for this rank.
        strength: Factor λ of the update W + λ ΔW, 1 except within `scaled`.
        config: The configuration that the adapter was made from. There is no other record of it.
        reads_weight: Whether the initial values, or the forward pass, depend on the values of W.
        is_linear: Whether the update is a linear function of B A, so that updates can be added up by their factors.
        label: Name of the variant, if any.
        fixed: Names of parameters that stay frozen while the others are trained.
    """

    reads_weight: ClassVar[bool] = False
    is_linear: ClassVar[bool] = True
    label: ClassVar[str] = ""
    fixed: ClassVar[tuple[str, ...]] = ()
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_bias: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor,
        layout: Layout,
        config: LoRAConfig,
        rank: int,
        scaling: float,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.layout, self.config, self.scaling, self.strength = layout, config, scaling, 1.0
        self._strengths: dict[object, float] = {}
        *experts, out_features, in_features = layout.matrix(weight).shape
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(rank, *experts, in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, *experts, dtype=dtype, device=device))
        bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if config.lora_bias else None
        self.register_parameter("lora_bias", bias)
        self.start(weight)

    @classmethod
    def refusal(cls, weight: Tensor, layout: Layout, config: LoRAConfig) -> str | None:
        """Return the reason why this variant cannot adapt a weight, if any. `weight` is as for the constructor."""
        return None

    def start(self, weight: Tensor) -> None:
        """Give the factors their initial values, for a W that is new or got new values. The bias of B is kept."""
        self._draw()

    def reset_parameters(self) -> None:
        """Draw A, and set B and its bias to zero. A seed gives the same values on every device."""
        self._draw()
        self.reset_bias()

    @torch.no_grad()
    def reset_bias(self) -> None:
        """Set the bias of B to zero, if there is one."""
        if self.lora_bias is not None:
            self.lora_bias.zero_()

    def base_changed(self, weight: Tensor) -> None:
        """Take note of a W that was loaded or written. The adapter of this class does not depend on it."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the A and B of the product, as matrices of shape (r, in) and (out, r) with the experts in front."""
        a, b = parameter_of(self, "lora_A"), parameter_of(self, "lora_B")
        return (a.transpose(0, 1), b.permute(2, 0, 1)) if self.layout.experts else (a, b)

    @torch.no_grad()
    def set_factors(self, a: Tensor, b: Tensor) -> None:
        """Give A and B values in the shapes of `factors`."""
        self.lora_A.copy_(a.transpose(0, 1) if self.layout.experts else a)
        self.lora_B.copy_(b.permute(1, 2, 0) if self.layout.experts else b)

    @property
    def rank(self) -> int:
        """Return the rank r of B A."""
        return len(self.lora_A)

    def own_bias(self) -> Tensor:
        """Return the c of the update, for an adapter with a bias."""
        return parameter_of(self, "lora_bias")

    def bias_update(self) -> Tensor:
        """Return λ s c of an adapter with a bias, which the layer adds to its own."""
        return self.own_bias() * (self.scaling * self.strength)

    def is_zero(self) -> bool:
        """Return whether the adapter is untrained, so that it has no effect at any λ."""
        a, b = self.factors()
        with without_autocast(a):
            changes = [b @ a] if self.lora_bias is None else [b @ a, self.own_bias()]
        return not any(bool(change.any()) for change in changes)

    def product(self) -> Tensor:
        """Return λ s B A as a matrix of shape (out, in), in the dtype of the adapter."""
        a, b = self.factors()
        with without_autocast(a):
            return b @ a * (self.scaling * self.strength)

    def delta_weight(self, weight: Tensor) -> Tensor:
        """Return ΔW = W' - W, in the shape of W and the dtype of the adapter.

        Args:
            weight: W as a plain tensor.
        """
        return self.layout.weight(self.product(), weight.shape)

    def change(self, kind: CalledKind[L], layer: L, weight: Tensor, input: Tensor, output: Tensor) -> Tensor:
        """Return ΔW x, computed in the dtype of x.

        Args:
            kind: The kind of the layer.
            layer: The adapted layer.
            weight: Its stored weight.
            input: x.
            output: W x + b.
        """
        a, b = self.factors()
        if not self.layout.one_hot:  # A and B are small: casting them is cheaper than casting x
            a, b = a.to(input.dtype), b.to(input.dtype)
            if self.config.dropout and self.training:
                input = F.dropout(input, self.config.dropout)
        change, scale = kind.low_rank(layer, input, a, b), self.scaling * self.strength
        return change if scale == 1 else change * scale

    @torch.no_grad()
    def scale(self, factor: float, weight: Tensor) -> None:
        """Multiply the update by a factor permanently. `weight` is W as a plain tensor."""
        self.lora_B.mul_(factor)
        if self.lora_bias is not None:
            self.lora_bias.mul_(factor)

    def scaled(self, key: object, factor: float | None) -> None:
        """Multiply the update by a factor until the same key is passed with `None`."""
        with _lock:
            strengths = {other: value for other, value in self._strengths.items() if other is not key}
            self._strengths = strengths if factor is None else {**strengths, key: factor}
            self.strength = math.prod(self._strengths.values())

    def replicate(self, mesh: DeviceMesh) -> None:
        """Replace the tensors with distributed ones, replicated over a mesh, with the values of its first process."""
        from torch.distributed.tensor import DTensor, Replicate

        for name, value in self.named_parameters(recurse=False):
            copy = DTensor.from_local(value.data, mesh, [Replicate()] * mesh.ndim, run_check=True)
            self._parameters[name] = nn.Parameter(copy, requires_grad=value.requires_grad)
        for name, buffer in self.named_buffers(recurse=False):
            self._buffers[name] = DTensor.from_local(buffer, mesh, [Replicate()] * mesh.ndim, run_check=True)

    def in_words(self) -> str:
        """Return the rank, the scale and the variant, for example `rank 1, scale 1, DoRA`."""
        words = [f"rank {self.rank}", f"scale {self.scaling:g}", self.label, "bias" if self.config.lora_bias else ""]
        return ", ".join(filter(None, words))

    def extra_repr(self) -> str:
        """Return the rank and the scale."""
        return f"rank={self.rank}, scaling={self.scaling:g}"

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"_strengths": {}, "strength": 1.0}  # a copy is not within the context of `scaled`

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # An adapter stays in float32 when its base is converted, since its steps are often too small for bfloat16.
        def convert(before: Tensor) -> Tensor:
            after = fn(before)
            wide = torch.promote_types(after.dtype, torch.float32)
            return after if after.dtype == wide else before.to(after.device, wide)

        super()._apply(convert, recurse)  # type: ignore[no-untyped-call]
        return self

    @torch.no_grad()
    def _draw(self) -> None:
        """Draw A and set B to zero."""
        if type(self.lora_A.data) is Tensor:  # A is drawn on the CPU, whose random numbers are the same everywhere
            a = torch.empty(self.lora_A.shape, dtype=self.lora_A.dtype, device="cpu")
            self._fill(a)
            self.lora_A.copy_(a)
        else:  # A is distributed, and PyTorch keeps its values consistent over the processes
            self._fill(self.lora_A)
        self.lora_B.zero_()

    def _fill(self, a: Tensor) -> None:
        if self.config.init == "gaussian":
            nn.init.normal_(a, std=1 / self.rank)
        elif self.layout.one_hot:
            nn.init.uniform_(a, -1, 1)
        else:
            nn.init.kaiming_uniform_(a.view(-1, a.shape[-1]), a=math.sqrt(5))  # uniform within 1 / sqrt(in)
        if self.layout.zero_column is not None:
            a[..., self.layout.zero_column].zero_()


class InEffect(NamedTuple):
    """Says what a layer computes with beside W. It is replaced, never changed, so other threads see all or nothing.

    Attributes:
        merged: W' within the context `merged`, or `None`. W itself is not changed.
        adapters: The adapters: the active ones, those that are left during a pause, or none with W'.
        bias: b + Σ s c within the context `merged`, if any adapter has a bias.
    """

    merged: Tensor | None
    adapters: tuple[Adapter, ...]
    bias: Tensor | None = None


class Adapters(nn.Module):
    """Holds the adapters of one weight by name, and says which of them the layer computes with.

    Args:
        kind: The kind of the layer, as far as this weight is concerned.
        parameter: Name of the weight in its layer; `""` for a bypass, which has no weight.

    Attributes:
        active: The names that were chosen.
        trained: Those of them that are trained. The others are frozen.
        in_effect: What the layer computes with.
        formed: W' during a forward pass that reads it more than once, by thread.
        is_computed: Whether the weight is computed by a hook or a parametrization, as in pruning and weight
            normalization.
    """

    def __init__(self, kind: AnyKind, parameter: str) -> None:
        super().__init__()
        self.kind, self.parameter = kind, parameter
        self.active: tuple[str, ...] = ()
        self.trained: tuple[str, ...] = ()
        self.in_effect = InEffect(None, ())
        self.formed: dict[int, Tensor] = {}
        self.is_computed = False
        self._pauses: Mapping[object, frozenset[str] | None] = {}
        self._merges: Mapping[object, tuple[Tensor, Tensor | None]] = {}

    def names(self) -> list[str]:
        """Return the names of all adapters."""
        return list(self._modules)

    def adapter(self, name: str) -> Adapter:
        """Return the adapter of a name."""
        found = self._modules[name]
        assert isinstance(found, Adapter)
        return found

    def activate(self, names: Collection[str], trained: Collection[str]) -> None:
        """Compute with the sum of the adapters of these names, as far as there are any.

        Those that are also in `trained` are trained, and all others frozen.
        """
        self.active = tuple(name for name in names if name in self._modules)
        self.trained = tuple(name for name in self.active if name in trained)
        for name in self._modules:
            adapter = self.adapter(name)
            adapter.requires_grad_(name in self.trained)
            for fixed in adapter.fixed:
                adapter.get_parameter(fixed).requires_grad_(False)
        self.update()

    def pause(self, key: object, names: Collection[str] | None = None) -> None:
        """Compute without the adapters of these names, or with W alone, until `resume` is called with the same key.

        Several pauses add up, and the last one to end counts.
        """
        with _changing():
            self._pauses = {**self._pauses, key: None if names is None else frozenset(names)}
            self.update()

    def resume(self, key: object) -> None:
        """End a pause."""
        with _changing():
            self._pauses = {other: names for other, names in self._pauses.items() if other is not key}
            self.update()

    def merge(self, key: object, weight: Tensor, bias: Tensor | None) -> None:
        """Compute with this W', and this bias if any, until `unmerge` is called with the same key.

        A pause goes first.
        """
        with _changing():
            self._merges = {**self._merges, key: (weight, bias)}
            self.update()

    def unmerge(self, key: object) -> None:
        """End a merge."""
        with _changing():
            self._merges = {other: values for other, values in self._merges.items() if other is not key}
            self.update()

    @property
    def have_bias(self) -> bool:
        """Return whether any of the adapters has a bias, active or not."""
        return any(self.adapter(name).config.lora_bias for name in self._modules)

    @property
    def is_paused(self) -> bool:
        """Return whether the layer computes with W alone, or without some of the active adapters."""
        return bool(self._pauses)

    @property
    def is_merged(self) -> bool:
        """Return whether the layer computes with a W' that was formed before."""
        return bool(self._merges)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add or replace an adapter."""
        super().add_module(name, module)
        self.update()

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:  # by tools that replace a child
        super().__setattr__(name, value)
        if name in self._modules:
            self.update()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self.active = tuple(other for other in self.active if other != name)
        self.trained = tuple(other for other in self.trained if other != name)
        self.update()

    def __getstate__(self) -> dict[str, object]:
        # A copy is not within the contexts of the original.
        state = vars(self) | {"_pauses": {}, "_merges": {}, "formed": {}}
        return state | {"in_effect": InEffect(None, tuple(map(self.adapter, self.active)))}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._merges = {}  # W' would be on the device of before
        self.update()
        return self

    def update(self) -> None:
        """Choose what the layer computes with, after a name, a context or a child has changed."""
        with _changing():
            merges = list(self._merges.values())
            if self._pauses:
                paused = self._pauses.values()
                left = [name for name in self.active if not any(names is None or name in names for names in paused)]
                self.in_effect = InEffect(None, tuple(map(self.adapter, left)))
            elif merges:
                weight, bias = merges[-1]
                self.in_effect = InEffect(weight, (), bias)
            else:
                self.in_effect = InEffect(None, tuple(map(self.adapter, self.active)))


def dense(weight: Tensor) -> Tensor:
    """Return a weight as a plain tensor, dequantized if it is one of torchao's quantized tensors."""
    if not is_quantized(weight):
        return weight
    # NF4Tensor has a static method `dequantize` for something else.
    method = getattr(weight, "get_original_weight", None) or weight.dequantize
    plain: Tensor = method()
    return plain


def is_quantized(weight: Tensor) -> bool:
    """Return whether a weight is one of torchao's quantized tensors."""
    if type(weight) in (Tensor, nn.Parameter):  # torch.compile can trace this, and not the next line
        return False
    return type(weight).__module__.startswith("torchao.")


def is_distributed(value: Tensor | None) -> TypeGuard[DTensor]:
    """Return whether a tensor is a `DTensor`."""
    return hasattr(value, "full_tensor")


def is_sharded(tensor: Tensor) -> bool:
    """Return whether each process holds a part of a tensor."""
    return is_distributed(tensor) and any(not placement.is_replicate() for placement in tensor.placements)


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Return a context without autocast on the device of `tensor`."""
    kind = tensor.device.type
    context: AbstractContextManager[None] = torch.autocast(kind if _has_autocast(kind) else "cpu", enabled=False)
    return context


def _changing() -> AbstractContextManager[object]:
    """Return the lock of contexts, which `torch.compile` cannot trace and does not need."""
    return nullcontext() if torch.compiler.is_compiling() else _lock


def this_thread() -> int:
    """Return a number of the current thread, or 0 while `torch.compile` traces, which is done by a single one."""
    return 0 if torch.compiler.is_compiling() else get_ident()


def drop_gradients(module: nn.Module) -> None:
    """Drop the gradients of parameters that are not trained, so that an optimizer of before does not move them."""
    for parameter in module.parameters():
        if not parameter.requires_grad:
            parameter.grad = None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # PyTorch 2.10 cannot trace it
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def parameter_of(module: nn.Module, name: str) -> Tensor:
    """Return a parameter without the detour of `__getattr__`, which costs a microsecond in each step."""
    found: Tensor | None = module._parameters.get(name)
    if found is None:  # in a replica of `nn.DataParallel`, which has attributes instead
        found = vars(module)[name]
    return found


def layers_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules by name in the order of `named_modules`, without adapters."""
    seen: set[nn.Module] = set()
    waiting: list[tuple[str, nn.Module]] = [("", module)]
    while waiting:
        name, layer = waiting.pop()
        if layer in seen or isinstance(layer, Adapters):
            continue
        seen.add(layer)
        yield name, layer
        start = f"{name}." if name else ""
        waiting += [(start + key, child) for key, child in reversed(layer._modules.items()) if child is not None]
