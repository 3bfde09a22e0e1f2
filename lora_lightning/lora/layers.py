"""Adapted layers. Each is the original object, whose class is replaced with a subclass of its own class.

The base keeps its parameters under their names, so plain checkpoints load, and hooks and references survive. The
subclass adds a forward pass, with adapters or around the plain one. Reading an adapted parameter returns the weight in
effect, W + ΔW, and nothing can be assigned to it: whoever assigns has usually read it before, and the update would
count twice. `bare` gives the plain layers to whatever writes into them or wraps them.

The adapters of a parameter are a child of the layer, `layer.lora_<parameter>`. W itself is `stored(layer, parameter)`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from threading import RLock
from types import MethodType, new_class
from typing import ClassVar, SupportsIndex, TypeAlias
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.fx._symbolic_trace import is_fx_symbolic_tracing  # no public function says so
from torch.nn import functional as F
from torch.nn.utils.parametrize import ParametrizationList

from lora_lightning.lora.adapter import (
    Adapter,
    Adapters,
    AnyKind,
    Forward,
    Kind,
    L,
    Layout,
    is_distributed,
    is_sharded,
    this_thread,
)
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.fused import fused_linear

Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
Kinds: TypeAlias = tuple[tuple[str, AnyKind], ...]
"""The adapted parameters of a layer and their kinds."""


class CalledKind(Kind[L]):
    """Describes one type of layer that is called, where the adapter has a path of its own: y = W x + b + s B A x."""

    is_reader = False

    def base(self, layer: L, weight: Tensor, input: Tensor) -> Tensor:
        """Return W x + b. `weight` is W as it is stored, or a plain W' within `merged`."""
        raise NotImplementedError

    def low_rank(self, layer: L, input: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return B A x, computed as the layer computes W x."""
        raise NotImplementedError

    def bias(self, layer: L) -> Tensor | None:
        """Return b, if the layer has one."""
        found: Tensor | None = getattr(layer, "bias", None)
        return found

    def per_output(self, layer: L, values: Tensor) -> Tensor:
        """Reshape a vector of shape (out,) such that it multiplies an output of the layer."""
        return values

    def adapted(self, layer: L, weight: Tensor, input: Tensor, adapters: tuple[Adapter, ...]) -> Tensor:
        """Return the output of the layer with these adapters, W x + b + Σ s B A x."""
        base = output = self.base(layer, weight, input)
        for adapter in adapters:
            output = output + adapter.change(self, layer, weight, input, base).to(output.dtype)
        return output

    def forward(self, plain: type[nn.Module]) -> Forward:
        kind = self

        def forward(self: L, input: Tensor) -> Tensor:
            # These are the lines of `adapters_of` and `stored`, since each call costs part of a microsecond.
            adapters = self._modules.get("lora_weight")
            if not isinstance(adapters, Adapters):
                return _plain_forward(self, input)
            merged, active, _ = adapters.in_effect
            if merged is not None:
                return kind.base(self, merged, input)
            weight = self._parameters.get("weight")
            if isinstance(input, Proxy) and active:
                raise RuntimeError(_is_traced(self))
            return kind.adapted(self, stored(self, "weight") if weight is None else weight, input, active)

        return forward


class LinearKind(CalledKind[nn.Linear]):
    """A linear layer: `y = x Wᵀ + b + s (x Aᵀ) Bᵀ` for x of shape (..., in)."""

    sizes: ClassVar[tuple[str, ...]] = ("in_features", "out_features")

    def base(self, layer: nn.Linear, weight: Tensor, input: Tensor) -> Tensor:
        return F.linear(input, weight, layer.bias)

    def low_rank(self, layer: nn.Linear, input: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.linear(input, a), b)


class FusedLinearKind(LinearKind):
    """`nn.Linear`, the same in fewer operations. For a layer with another `base`, extend `LinearKind`."""

    def adapted(self, layer: nn.Linear, weight: Tensor, input: Tensor, adapters: tuple[Adapter, ...]) -> Tensor:
        if len(adapters) == 1:
            (adapter,), parameters = adapters, layer._parameters
            # `layer.bias` is slower, and needed where a hook computes the bias or the adapter adds to it.
            is_stored = "bias" in parameters and not adapter.config.lora_bias
            bias = parameters["bias"] if is_stored else layer.bias
            output = fused_linear(adapter, input, weight, bias)
            if output is not None:
                return output
        return super().adapted(layer, weight, input, adapters)


class ConvKind(CalledKind[Conv]):
    """A convolution: one to r channels, with kernels A of shape (r, in / groups, *kernel), then one of size 1 with B.

    The first one has the stride, padding and dilation of the layer. All groups share A and have separate rows of B.
    """

    def base(self, layer: Conv, weight: Tensor, input: Tensor) -> Tensor:
        output: Tensor = layer._conv_forward(input, weight, layer.bias)
        return output

    def low_rank(self, layer: Conv, input: Tensor, a: Tensor, b: Tensor) -> Tensor:
        kernel = layer.kernel_size
        ones = [1] * len(kernel)
        a = a.view(-1, layer.in_channels // layer.groups, *kernel)
        a = a if layer.groups == 1 else a.repeat(layer.groups, 1, *ones)
        low: Tensor = layer._conv_forward(input, a, None)
        return _convolve(low, b.view(*b.shape, *ones), layer.groups)

    def per_output(self, layer: Conv, values: Tensor) -> Tensor:
        return values.view(-1, *[1] * len(layer.kernel_size))


class EmbeddingKind(CalledKind[nn.Embedding]):
    """`nn.Embedding`, where x is a one-hot vector. A stays zero at `padding_idx`, so this vector does not change."""

    sizes = ("num_embeddings", "embedding_dim")

    def layout(self, layer: nn.Embedding, parameter: str) -> Layout:
        return Layout(transposed=True, one_hot=True, zero_column=layer.padding_idx)

    def refusal(self, layer: nn.Embedding, parameter: str, weight: Tensor, config: LoRAConfig) -> str | None:
        if config.lora_bias:
            return "is an embedding, for which lora_bias=True is not supported"
        rewrites = layer.max_norm is not None or layer.scale_grad_by_freq
        return "has max_norm or scale_grad_by_freq, which change the weight or its gradient" if rewrites else None

    def base(self, layer: nn.Embedding, weight: Tensor, input: Tensor) -> Tensor:
        return F.embedding(input, weight, layer.padding_idx, sparse=layer.sparse)

    def low_rank(self, layer: nn.Embedding, input: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.embedding(input, a.t(), layer.padding_idx), b)


class Adapted(nn.Module):
    """Marks the class of an adapted layer. Every name that it adds begins with `lora_`, but for methods of `nn.Module`.

    Attributes:
        lora_plain: The class of the layer without adapters.
        lora_kinds: The adapted parameters and their kinds.
        lora_read: The parameters that return the weight in effect, and `bias` if adapters add to it.
    """

    lora_plain: ClassVar[type[nn.Module]]
    lora_kinds: ClassVar[Kinds]
    lora_read: ClassVar[tuple[str, ...]]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        parameter = name.removesuffix("_orig")  # pruning and hooks of the old kind keep W under such a name
        # `fully_shard` puts distributed tensors into place and takes them out.
        is_sharding = is_distributed(param) or is_distributed(self._parameters.get(name))
        if parameter not in self.lora_read:
            super().register_parameter(name, param)
        elif is_sharding or vars(self).get("lora_is_loading"):
            self._parameters[name] = param
        else:
            raise RuntimeError(_is_read_only(self, parameter))

    def __delattr__(self, name: str) -> None:
        if name in self.lora_read:  # by torch.nn.utils.parametrize, which would make W + ΔW a part of the base
            raise RuntimeError(_is_read_only(self, name))
        super().__delattr__(name)

    def _save_to_state_dict(self, destination: dict[str, object], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.lora_read:  # some modules save the weight that they read
            value = self._parameters.get(name)
            if value is not None and prefix + name in destination:
                destination[prefix + name] = value if keep_vars else value.detach()

    def _load_from_state_dict(self, state_dict: dict[str, object], prefix: str, *others: object) -> None:
        vars(self)["lora_is_loading"] = True  # since load_state_dict(assign=True) assigns parameters
        try:
            super()._load_from_state_dict(state_dict, prefix, *others)
        finally:
            del vars(self)["lora_is_loading"]
        for parameter, _ in self.lora_kinds:
            if prefix + parameter in state_dict:
                base_changed(self, parameter)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        if self.lora_plain.__reduce_ex__ is object.__reduce_ex__ and self.lora_plain.__reduce__ is object.__reduce__:
            made_from = self.lora_plain, self.lora_kinds, _adds_bias(self)
            return _new, made_from, self.__getstate__()  # type: ignore[no-untyped-call]
        children = {child_name(parameter): adapters_of(self, parameter) for parameter, _ in self.lora_kinds}
        adds_bias = _adds_bias(self)
        with bare(self) as plain:  # the class has a way of its own, which may read the weight
            reduced = plain.__reduce_ex__(protocol)
        if isinstance(reduced, str) or any(part is not None for part in reduced[3:]):
            raise TypeError(f"A {self.lora_plain.__name__} with adapters cannot be copied or pickled in its own way.")
        return _rebuilt, (*reduced[:3], *[None] * (3 - len(reduced[:3])), self.lora_kinds, adds_bias, children)


class ReadOnlyParametrizations(nn.ModuleDict):
    """The parametrizations of an adapted layer. `torch.nn.utils.parametrize` asks whether one exists before a change.

    Outside `bare`, this would make W + ΔW a part of the base, and then fail half-way.
    """

    def __contains__(self, key: str) -> bool:
        raise RuntimeError(
            f"The parametrizations of a layer with adapters are for reading only, also that of {key!r}. Change them "
            "inside lora.bare(net), which sets the adapters aside, or before attach."
        )


@contextmanager
def without_power_iteration(module: nn.Module) -> Iterator[None]:
    """Read computed weights without changing buffers. In training, spectral norm updates its estimate at each read."""
    lists = [child for child in module.modules() if isinstance(child, ParametrizationList)]
    training = [child for found in lists for child in found.modules() if child.training]
    try:
        for child in training:
            child.training = False
        yield
    finally:
        for child in training:
            child.training = True


def adapters_of(layer: nn.Module, parameter: str) -> Adapters:
    """Return the adapters of a parameter of an adapted layer."""
    found = layer._modules[child_name(parameter)]
    assert isinstance(found, Adapters)
    return found


def child_name(parameter: str) -> str:
    """Return the name of the child that holds the adapters of a parameter."""
    return f"lora_{parameter or 'bypass'}"


def stored(layer: nn.Module, parameter: str) -> Tensor:
    """Return W, whatever adapters add to it."""
    value: Tensor | None = layer._parameters.get(parameter)
    if value is None:
        value = layer._buffers.get(parameter)  # where a frozen parametrization was removed
    if value is None:
        value = vars(layer).get(parameter)  # computed by a hook, as in pruning
    if value is not None:
        return value
    plain = layer.lora_plain if isinstance(layer, Adapted) else type(layer)
    computed: Tensor = getattr(plain, parameter).fget(layer)  # by a parametrization
    return computed


def no_weight(module: nn.Module) -> Tensor:
    """Return zero, in the dtype and on the device of a module, for a bypass."""
    floating = (parameter for parameter in module.parameters() if parameter.is_floating_point())
    return next(floating, torch.zeros(())).detach().new_zeros(())


def is_computed(layer: nn.Module, parameter: str) -> bool:
    """Return whether a weight is computed by a hook or a parametrization, so that there is no W to write."""
    return bool(parameter) and layer._parameters.get(parameter) is None


def effective(layer: nn.Module, adapters: Adapters) -> Tensor:
    """Return W + Σ ΔW, computed in the dtype of the adapters and rounded once to the dtype of W."""
    formed = adapters.formed.get(this_thread()) if adapters.formed else None
    if formed is not None and (formed.requires_grad or not torch.is_grad_enabled()):
        return formed
    merged, active, _ = adapters.in_effect
    if merged is not None:
        return merged
    return with_updates(layer, adapters, active) if active else stored(layer, adapters.parameter)


def with_updates(layer: nn.Module, adapters: Adapters, chosen: tuple[Adapter, ...]) -> Tensor:
    """Return W + Σ ΔW for some of the adapters of a weight, as a plain tensor."""
    plain = total = adapters.kind.dense(layer, stored(layer, adapters.parameter))
    for adapter in chosen:
        delta = adapter.delta_weight(plain)
        total = total.to(delta.dtype) + delta
    return total.to(plain.dtype)


def bias_in_effect(layer: nn.Module, adapters: Adapters) -> Tensor | None:
    """Return b + Σ s c, rounded once to the dtype of b, or of W if there is no b."""
    merged, active, bias = adapters.in_effect
    return bias_with_updates(layer, active) if merged is None else bias


def bias_with_updates(layer: nn.Module, adapters: tuple[Adapter, ...]) -> Tensor | None:
    """Return b + Σ s c for these adapters."""
    plain = total = stored_bias(layer)
    for adapter in adapters:
        if adapter.config.lora_bias:
            update = adapter.bias_update()
            total = update if total is None else total.to(update.dtype) + update
    return None if total is None else total.to((stored(layer, "weight") if plain is None else plain).dtype)


def stored_bias(layer: nn.Module) -> Tensor | None:
    """Return b, whatever adapters add to it."""
    found: Tensor | None = layer._parameters.get("bias")
    return vars(layer).get("bias") if found is None else found


def base_changed(layer: nn.Module, parameter: str) -> None:
    """Tell the adapters of a parameter that its values were loaded or written."""
    adapters = adapters_of(layer, parameter)
    found = [adapter for name in adapters.names() if (adapter := adapters.adapter(name)).reads_weight]
    if found:
        weight = adapters.kind.dense(layer, stored(layer, parameter))
        for adapter in found:
            adapter.base_changed(weight)


def place(layer: nn.Module, parameter: str, kind: AnyKind, name: str, adapter: Adapter) -> None:
    """Give a layer an adapter of one of its parameters."""
    had_bias = _adds_bias(layer)
    kinds = layer.lora_kinds if isinstance(layer, Adapted) else ()
    if parameter not in dict(kinds):
        plain = layer.lora_plain if isinstance(layer, Adapted) else type(layer)
        cls = adapted_class(plain, (*kinds, (parameter, kind)), had_bias)
        adapters = Adapters(kind, parameter).train(layer.training)
        adapters.is_computed = is_computed(layer, parameter)
        layer.add_module(child_name(parameter), adapters)
        _become(layer, cls)
    adapters_of(layer, parameter).add_module(name, adapter.train(layer.training))
    if adapter.config.lora_bias and not had_bias:
        _become(layer, _class_for(layer))


def _adds_bias(layer: nn.Module) -> bool:
    """Return whether adapters of a layer add to its bias."""
    if not isinstance(layer, Adapted):
        return False
    return any(adapters_of(layer, parameter).have_bias for parameter, _ in layer.lora_kinds if parameter)


def _class_for(layer: nn.Module) -> type[nn.Module]:
    """Return the class that an adapted layer should have."""
    assert isinstance(layer, Adapted)
    return adapted_class(layer.lora_plain, layer.lora_kinds, _adds_bias(layer))


def take_away(layer: nn.Module, name: str) -> None:
    """Remove the adapters of one name from a layer, and a child or the class with the last of them."""
    if not isinstance(layer, Adapted):
        return
    for parameter, _ in layer.lora_kinds:
        adapters = adapters_of(layer, parameter)
        if name in adapters.names():
            delattr(adapters, name)
    left = tuple((parameter, kind) for parameter, kind in layer.lora_kinds if adapters_of(layer, parameter).names())
    adds_bias = any(adapters_of(layer, parameter).have_bias for parameter, _ in left)
    if left != layer.lora_kinds or adds_bias != ("bias" in layer.lora_read):
        empty = [child_name(parameter) for parameter, _ in layer.lora_kinds if parameter not in dict(left)]
        # The class first, for the sake of other threads.
        _become(layer, adapted_class(layer.lora_plain, left, adds_bias) if left else layer.lora_plain)
        for child in empty:
            del layer._modules[child]


def restore(layer: nn.Module) -> None:
    """Remove all adapters of a layer and give it back its class."""
    assert isinstance(layer, Adapted)
    children = [child_name(parameter) for parameter, _ in layer.lora_kinds]
    _become(layer, layer.lora_plain)  # first, for the sake of other threads
    for name in children:
        del layer._modules[name]


bare_layers: WeakKeyDictionary[nn.Module, _Held] = WeakKeyDictionary()
"""The layers whose adapters are set aside by `bare`, with these."""


@contextmanager
def bare(module: nn.Module) -> Iterator[nn.Module]:
    """Give the layers of `module` their plain classes, without adapters, within this context.

    This is for whatever writes into layers or wraps them: initialization, `tie_weights`, pruning,
    `torch.nn.utils.parametrize`, quantization. What it changed is kept, and the adapters come back on top of it. Layers
    that were replaced or resized come back without adapters, and a warning names them; merge the adapters first to keep
    their effect.

    A forward pass within the context, also of another thread, is that of the base. The state dict has no adapters.
    Contexts may overlap, and the last one to end brings the adapters back. No other thread may be inside an
    `nn.Sequential` with a bypass while a context begins or ends.

    Raises:
        RuntimeError: If the class of a layer was replaced after `attach`, as `fully_shard` does.

    Example::

        with lora.bare(net):
            torch.nn.utils.parametrizations.weight_norm(net.linear1)
    """
    key = object()
    with _lock, without_power_iteration(module):
        held = [
            bare_layers[layer] if layer in bare_layers else _Held(name, layer)
            for name, layer in module.named_modules()
            if isinstance(layer, Adapted) or layer in bare_layers
        ]
        for each in held:
            require_own_class(each.layer)
        for each in held:
            each.set_aside(key)
    try:
        yield module
    finally:
        with _lock, without_power_iteration(module):
            modules = set(module.modules())
            lost = [each.name for each in held if not each.put_back(key, each.layer in modules)]
        if lost:
            warnings.warn(
                "These layers were replaced or resized inside bare(net), and the new ones have no adapters: "
                f"{', '.join(map(repr, lost))}. Attach new adapters, or merge the adapters before such a change.",
                stacklevel=3,
            )


class _Held:
    """Holds the adapters of one layer while it is bare."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        assert isinstance(layer, Adapted)
        self.name, self.layer, self.kinds = name, layer, layer.lora_kinds
        self.keys: set[object] = set()
        self.children = {child_name(parameter): adapters_of(layer, parameter) for parameter, _ in self.kinds}
        self.shapes, self.was_distributed = self._shapes(), self._is_distributed()

    def set_aside(self, key: object) -> None:
        """Make the layer plain until `put_back` is called with each of the keys."""
        if not self.keys:
            bare_layers[self.layer] = self
            _become(self.layer, self.layer.lora_plain)
            for name in self.children:
                del self.layer._modules[name]
        self.keys.add(key)

    def put_back(self, key: object, is_in_place: bool) -> bool:
        """Put the adapters back if the layer is still in its module and has weights of the same shape."""
        self.keys.discard(key)
        if self.keys:
            return True
        layer = self.layer
        del bare_layers[layer]
        if not is_in_place or self._shapes() != self.shapes:
            return False
        for adapters in self.children.values():
            adapters.is_computed = is_computed(layer, adapters.parameter)
        layer._modules.update(self.children)
        adds_bias = any(adapters.have_bias for adapters in self.children.values())
        _become(layer, adapted_class(type(layer), self.kinds, adds_bias))
        for parameter, _ in self.kinds:
            base_changed(layer, parameter)
        if self._is_distributed() and not self.was_distributed:  # by parallelize_module
            self._replicate()
        return True

    def _is_distributed(self) -> bool:
        return any(is_distributed(stored(self.layer, name)) for name, _ in self.kinds if name)

    def _replicate(self) -> None:
        for adapters in self.children.values():
            weight = stored(self.layer, adapters.parameter) if adapters.parameter else None
            if is_distributed(weight):
                for name in adapters.names():
                    adapters.adapter(name).replicate(weight.device_mesh)

    def _shapes(self) -> list[torch.Size]:
        found = []
        for parameter, kind in self.kinds:
            if not parameter:
                continue
            weight = stored(self.layer, parameter)
            packed_before = kind.is_packed and not weight.is_floating_point()
            found.append(kind.shape(self.layer, weight) if packed_before else weight.shape)
        return found


def require_own_class(layer: nn.Module) -> None:
    """Refuse a layer whose class was replaced once more after ours, as by `fully_shard`.

    Raises:
        RuntimeError: If it was.
    """
    if isinstance(layer, Adapted) and type(layer) is not _class_for(layer):
        raise RuntimeError(
            f"The class of this {layer.lora_plain.__name__} was replaced with {type(layer).__name__} after attach. "
            "Undo that first."
        )


_lock = RLock()
_classes: WeakValueDictionary[tuple[object, ...], type[nn.Module]] = WeakValueDictionary()


def adapted_class(plain: type[nn.Module], kinds: Kinds, adds_bias: bool = False) -> type[nn.Module]:
    """Return the subclass of `plain` for layers with adapters of these parameters, which may add to the bias."""
    key = plain, tuple((parameter, type(kind)) for parameter, kind in kinds), adds_bias
    with _lock:
        found = _classes.get(key)
        if found is None:
            found = _classes[key] = _make_class(plain, kinds, adds_bias)
        return found


def _make_class(plain: type[nn.Module], kinds: Kinds, adds_bias: bool) -> type[nn.Module]:
    weights = tuple(name for name, kind in kinds if name and not kind.is_packed)
    read = (*weights, "bias") if adds_bias else weights
    members: dict[str, object] = {"lora_plain": plain, "lora_kinds": kinds, "lora_read": read}
    members |= {name: _weight_in_effect(name) for name in weights}
    members |= {"bias": property(_read_bias, _refuse_bias)} if adds_bias else {}
    members |= {name: _fixed_size(name) for _, kind in kinds for name in kind.sizes if not hasattr(plain, name)}
    members |= {name: _reset(name) for name in ("reset_parameters", "_reset_parameters") if hasattr(plain, name)}
    for _, kind in kinds:
        members["forward"] = kind.forward(plain)
    # torch.fx takes layers of torch.nn as they are. From others it would copy the weights that it reads, W + ΔW.
    is_leaf = any(kind.is_leaf for _, kind in kinds) and not plain.__module__.startswith("torch.nn")
    members["__module__"] = "torch.nn" if is_leaf else plain.__module__
    members["__doc__"] = plain.__doc__
    mixins = tuple(dict.fromkeys(kind.mixin for _, kind in kinds if kind.mixin is not None))
    return subclass(f"LoRA{plain.__name__}", plain, (*mixins, Adapted), members)


def subclass(
    name: str, plain: type[nn.Module], mixins: tuple[type, ...], members: dict[str, object]
) -> type[nn.Module]:
    """Return a subclass of `plain` whose objects can be objects of `plain` whose class was replaced."""
    # Python compares the first bases when it replaces the class of an object.
    first = new_class(f"{plain.__name__}Base", (plain,))
    first.__module__ = plain.__module__

    def fill(namespace: dict[str, object]) -> None:
        namespace.update(members)

    made: type[nn.Module] = new_class(name, (first, *mixins, plain), exec_body=fill)
    return made


def _plain_forward(layer: nn.Module, input: Tensor) -> Tensor:
    """Return the output of a layer that became plain after a forward pass began, since a thread entered `bare`."""
    output: Tensor = layer.forward(input)
    return output


def _become(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Make a layer an adapted one, or a plain one, with its parametrizations, if any."""
    set_class(layer, cls)
    parametrizations = layer._modules.get("parametrizations")
    if type(parametrizations) in (nn.ModuleDict, ReadOnlyParametrizations):
        kept = ReadOnlyParametrizations if issubclass(cls, Adapted) else nn.ModuleDict
        object.__setattr__(parametrizations, "__class__", kept)


def set_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Replace the class of a layer. Forward passes that a hook of accelerate keeps on the object follow."""
    before = type(layer).forward
    object.__setattr__(layer, "__class__", cls)
    # To see whether a module has changed, torch.compile of PyTorch 2.10 looks at its dictionaries alone.
    layer.__dict__["lora_class"] = cls
    del layer.__dict__["lora_class"]
    for name in ("forward", "_old_forward"):
        method = vars(layer).get(name)
        if isinstance(method, MethodType) and method.__self__ is layer and method.__func__ is before:
            vars(layer)[name] = MethodType(cls.forward, layer)


def _weight_in_effect(parameter: str) -> property:
    child = child_name(parameter)

    def read(self: nn.Module) -> Tensor:
        if is_fx_symbolic_tracing():
            raise RuntimeError(
                f"torch.fx traces into this {type(self).__name__} and would keep the {parameter!r} in effect as a "
                "constant. Merge the adapters first, or trace a module that contains this one."
            )
        weight, adapters = self._parameters.get(parameter), self._modules.get(child)
        if not isinstance(adapters, Adapters):  # another thread has entered `bare`
            return stored(self, parameter)
        if weight is not None and not _can_be_added(weight, adapters):
            return weight
        return effective(self, adapters)

    def write(self: Adapted, value: Tensor) -> None:  # a Parameter is registered instead
        if "parametrizations" in self._modules:
            raise RuntimeError(_is_read_only(self, parameter))
        adapters = adapters_of(self, parameter)  # W is computed by a hook, or copied by `nn.DataParallel`
        if not adapters.is_computed and "_is_replica" not in vars(self):
            # A hook of the old kind was registered now, and has read W + ΔW.
            adapters.is_computed = True
            _start_again(self, parameter, value)
        self.__dict__[parameter] = value

    return property(read, write, doc=f"The {parameter} in effect, W + ΔW. It is for reading only.")


def _read_bias(layer: nn.Module) -> Tensor | None:
    bias, adapters = layer._parameters.get("bias"), layer._modules.get("lora_weight")
    if not isinstance(adapters, Adapters):  # another thread has entered `bare`
        return stored_bias(layer)
    if bias is not None and not _can_be_added(bias, adapters):
        return bias
    return bias_in_effect(layer, adapters)


def _refuse_bias(layer: Adapted, value: object) -> None:
    raise RuntimeError(_is_read_only(layer, "bias"))


def _can_be_added(weight: Tensor, adapters: Adapters) -> bool:
    """Return whether ΔW can be added to W, or s c to b.

    `fully_shard` reads the shard that it owns, and must get that.
    """
    if not is_distributed(weight):
        return True
    mesh, factors = weight.device_mesh, [adapter.lora_A for adapter in adapters.in_effect.adapters]
    return all(is_distributed(a) and a.device_mesh == mesh and not is_sharded(a) for a in factors)


def _start_again(layer: nn.Module, parameter: str, weight: Tensor) -> None:
    """Give adapters whose update became a part of the base new initial values, so that it does not count twice."""
    adapters = adapters_of(layer, parameter)
    merged, active, _ = adapters.in_effect
    read = [name for name in adapters.active if merged is not None or adapters.adapter(name) in active]
    counted = [name for name in read if bool(adapters.adapter(name).product().any())]
    for name in counted:
        adapters.adapter(name).start(weight.detach())
    if counted:
        warnings.warn(
            f"{parameter!r} of a {type(layer).__name__} was reparametrized outside bare(net). The update of the "
            f"adapters {', '.join(counted)} is now a part of the base, and the adapters start again.",
            stacklevel=4,
        )


def _fixed_size(name: str) -> property:
    def read(self: nn.Module) -> object:
        if name not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self.__dict__[name]

    def write(self: Adapted, value: object) -> None:
        raise RuntimeError(
            f"{name!r} of this {self.lora_plain.__name__} cannot become {value!r}, since the layer has adapters of its "
            "present size. Resize it inside lora.bare(net), or merge the adapters first."
        )

    return property(read, write)


def _reset(method: str) -> Callable[..., None]:
    """Return a method that gives a layer and its adapters new initial values."""

    def reset(self: Adapted, *arguments: object, **keywords: object) -> None:
        reset_plain, adapts_a_weight = getattr(self.lora_plain, method), any(name for name, _ in self.lora_kinds)
        with bare(self) if adapts_a_weight else nullcontext():  # a bypass leaves the layers inside to their own resets
            reset_plain(self, *arguments, **keywords)
        for parameter, kind in self.lora_kinds:
            weight = kind.dense(self, stored(self, parameter)) if parameter else no_weight(self)
            adapters = adapters_of(self, parameter)
            for name in adapters.names():
                adapters.adapter(name).start(weight)
                adapters.adapter(name).reset_bias()

    return reset


def _is_traced(layer: nn.Module) -> str:
    """Return the error message for torch.fx, which reads W and then copies `layer.weight`, where ΔW counts twice."""
    return (
        f"torch.fx cannot trace into this {type(layer).__name__}, which has adapters. Trace a module that contains it "
        "and keeps it as a leaf, trace inside lora.merged(net), or merge the adapters first."
    )


def _is_read_only(layer: Adapted, parameter: str) -> str:
    return (
        f"{parameter!r} of this {layer.lora_plain.__name__} has adapters and is for reading only. Change it inside "
        "lora.bare(net), which sets the adapters aside, or before attach."
    )


def _convolve(input: Tensor, kernels: Tensor, groups: int) -> Tensor:
    if kernels.dim() == 3:
        return F.conv1d(input, kernels, groups=groups)
    return F.conv2d(input, kernels, groups=groups) if kernels.dim() == 4 else F.conv3d(input, kernels, groups=groups)


def _rebuilt(
    function: Callable[..., nn.Module],
    arguments: tuple[object, ...],
    state: Mapping[str, object] | None,
    kinds: Kinds,
    adds_bias: bool,
    children: Mapping[str, Adapters],
) -> nn.Module:
    """Return a copy of an adapted layer whose plain class says how it is copied and pickled."""
    layer = function(*arguments)
    if state is not None:
        layer.__setstate__(state)  # type: ignore[no-untyped-call]
    layer._modules.update(children)
    _become(layer, adapted_class(type(layer), kinds, adds_bias))
    return layer


def _new(plain: type[nn.Module], kinds: Kinds, adds_bias: bool) -> nn.Module:
    """Return an empty object of the class, for copies and pickles."""
    cls = adapted_class(plain, kinds, adds_bias)
    return cls.__new__(cls)
