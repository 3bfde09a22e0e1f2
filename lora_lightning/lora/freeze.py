"""Freezes a base: its parameters, and the running statistics of its norm layers."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lora_lightning.lora.layers import compose


class FrozenStatistics(nn.Module):
    """Mixin for norm layers. They always compute as in evaluation mode, with constant statistics."""

    lora_prefix = "Frozen"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        training, self.training = self.training, False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = training


def freeze(module: nn.Module, trained: Iterable[nn.Module] = ()) -> None:
    """Freeze the parameters and norm statistics of `module`, except those inside the modules `trained`."""
    module.requires_grad_(False)
    unfreeze_statistics(module)
    inside = {layer for other in trained for layer in other.modules()}
    for layer in module.modules():
        if layer in inside:
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(parameter.is_floating_point())
        elif isinstance(layer, _NormBase) and layer.running_mean is not None:
            compose(layer, FrozenStatistics)


def unfreeze_statistics(module: nn.Module) -> None:
    """Let norm layers update their statistics again."""
    for layer in module.modules():
        if isinstance(layer, FrozenStatistics):
            compose(layer)
