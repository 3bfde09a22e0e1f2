"""Supports adapters in modules that are distributed by `fully_shard` (FSDP2) or tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.model import adapted_weights


def full(value: Tensor) -> Tensor:
    """Gather a distributed tensor, and return any other tensor as it is. All processes have to call this."""
    gathered: Tensor = value.full_tensor() if is_distributed(value) else value  # type: ignore[attr-defined]
    return gathered


def is_distributed(value: Tensor | None) -> bool:
    """Return whether a tensor is a `DTensor`."""
    return hasattr(value, "full_tensor")


def local(value: Tensor) -> Tensor:
    """Return the local shard of a tensor."""
    part: Tensor = value.to_local() if is_distributed(value) else value  # type: ignore[attr-defined]
    return part


def settle(module: nn.Module, group: Any = None) -> None:
    """Prepare adapters for distributed weights. Call this after the adapters are attached and the weights are distributed.

    Adapters that were attached first have been distributed with the weights. Adapters that were attached later are replicated: inside
    `fully_shard` as plain tensors, whose gradients are averaged over the processes, otherwise as distributed tensors. All
    processes have to call this.

    Args:
        module: An adapted module.
        group: The processes that `fully_shard` distributes over; `None` for all.

    Raises:
        ValueError: If adapters were attached to weights that are distributed by both methods.
    """
    sharded = _inside_of_fully_shard(module)
    for each in adapted_weights(module):
        weight = each.weight
        if not is_distributed(weight):
            continue
        if each.layer in sharded:
            # fully_shard asks for the parameter that it stored, and must not get the effective weight.
            each.layer.lora_sharded_over = weight.device_mesh
        names = [key for key in each.adapter._parameters if key.startswith("lora_")]
        late = [name for name in names if not is_distributed(each.adapter._parameters[name])]
        if late and each.layer in sharded and weight.device_mesh.ndim > 1:
            raise ValueError(
                f"Layer {each.name!r} was adapted after it was distributed by both fully_shard and tensor parallelism. Create the layers "
                "in __init__, so that the adapters are distributed with them."
            )
        for name in late:
            value = each.adapter.get_parameter(name)
            torch.distributed.broadcast(value.data, 0)
            if each.layer in sharded:
                value.register_post_accumulate_grad_hook(_Average(group))
            else:
                from torch.distributed.tensor import DTensor, Replicate

                placements = [Replicate()] * weight.device_mesh.ndim
                copy = DTensor.from_local(value.data, weight.device_mesh, placements, run_check=False)
                each.adapter._parameters[name] = nn.Parameter(copy, requires_grad=value.requires_grad)


class _Average:
    """Averages a gradient over processes. Parts that were averaged before are kept, so gradients can be accumulated."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad /= torch.distributed.get_world_size(self.group)
            torch.distributed.all_reduce(parameter.grad, group=self.group)


def _inside_of_fully_shard(module: nn.Module) -> set[nn.Module]:
    from torch.distributed.fsdp import FSDPModule

    return {layer for child in module.modules() if isinstance(child, FSDPModule) for layer in child.modules()}
