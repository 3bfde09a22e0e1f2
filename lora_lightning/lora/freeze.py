"""Freezes a base: its parameters, and the running statistics of its norm layers."""

from __future__ import annotations

from collections.abc import Iterable
from threading import RLock
from typing import ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils.hooks import RemovableHandle

from lora_lightning.lora.layers import set_class, subclass


class FrozenStatistics(nn.Module):
    """Marks the class of a frozen norm layer or spectral norm, which always computes as in evaluation mode.

    Attributes:
        lora_plain: The class of the layer before.
    """

    lora_plain: ClassVar[type[nn.Module]]

    def forward(self, *arguments: object, **keywords: object) -> Tensor:
        """Return the output of evaluation mode."""
        if torch.compiler.is_compiling():
            return self.lora_evaluate(*arguments, **keywords)
        own = self.__dict__  # assigning to the attribute itself takes microseconds
        with _lock:  # another thread must not see the mode of before in the middle of its forward pass
            training, own["training"] = own["training"], False
            try:
                output: Tensor = self.lora_plain.forward(self, *arguments, **keywords)
                return output
            finally:
                own["training"] = training

    def lora_evaluate(self, *arguments: object, **keywords: object) -> Tensor:
        """Return the output of evaluation mode, in a way that `torch.compile` can trace."""
        training, self.training = self.training, False
        try:
            output: Tensor = self.lora_plain.forward(self, *arguments, **keywords)
            return output
        finally:
            self.training = training

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return _new, (self.lora_plain,), self.__getstate__()  # type: ignore[no-untyped-call]


def freeze(module: nn.Module, trained: Iterable[nn.Module] = ()) -> None:
    """Freeze the parameters and norm statistics of `module`, and train those inside the modules `trained`."""
    module.requires_grad_(False)
    unfreeze_statistics(module)
    inside = {layer for other in trained for layer in other.modules()}
    for layer in module.modules():
        if layer in inside:
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        elif _has_statistics(layer):
            set_class(layer, _frozen_class(type(layer)))


def _has_statistics(layer: nn.Module) -> bool:
    """Return whether a layer updates buffers in training: a norm layer or a spectral norm."""
    return isinstance(layer, _SpectralNorm) or (isinstance(layer, _NormBase) and layer.running_mean is not None)


def unfreeze_statistics(module: nn.Module) -> None:
    """Let norm layers update their statistics again, in training mode."""
    for layer in module.modules():
        if isinstance(layer, FrozenStatistics):
            set_class(layer, layer.lora_plain)


class FreezeReplacedNorms:
    """A forward pre-hook that freezes norm layers which took the place of frozen ones.

    `Trainer(sync_batchnorm=True)` replaces the norm layers of a model after its callbacks have prepared it. Each module
    that contains frozen norm layers has such a hook, since any of them may be called directly.

    Args:
        module: A module.

    Attributes:
        places: The parents of frozen norm layers, and the names of these layers there.
    """

    def __init__(self, module: nn.Module) -> None:
        children = ((parent, name, child) for parent in module.modules() for name, child in parent.named_children())
        self.places = [(parent, name) for parent, name, child in children if isinstance(child, FrozenStatistics)]

    def __call__(self, module: nn.Module, inputs: object) -> None:
        """Freeze the layers in these places again if necessary."""
        if torch.compiler.is_compiling():
            return
        for parent, name in self.places:
            layer = parent._modules.get(name)
            if not isinstance(layer, FrozenStatistics) and isinstance(layer, _NormBase):
                set_class(layer, _frozen_class(type(layer)))


def keep_frozen(module: nn.Module) -> list[RemovableHandle]:
    """Freeze norm layers that will take the place of frozen ones, and return the handles of the hooks that do so."""
    if not any(isinstance(layer, FrozenStatistics) for layer in module.modules()):
        return []
    hooks = ((child, FreezeReplacedNorms(child)) for child in module.modules())
    return [child.register_forward_pre_hook(hook) for child, hook in hooks if hook.places]


_lock = RLock()
_classes: WeakValueDictionary[type[nn.Module], type[nn.Module]] = WeakValueDictionary()


def _frozen_class(plain: type[nn.Module]) -> type[nn.Module]:
    with _lock:
        found = _classes.get(plain)
        if found is None:
            members: dict[str, object] = {"lora_plain": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
            found = _classes[plain] = subclass(f"Frozen{plain.__name__}", plain, (FrozenStatistics,), members)
        return found


def _new(plain: type[nn.Module]) -> nn.Module:
    """Return an empty object of the class, for copies and pickles."""
    cls = _frozen_class(plain)
    return cls.__new__(cls)
