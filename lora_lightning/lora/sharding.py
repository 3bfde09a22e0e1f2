"""Supports adapters in modules that are distributed by `fully_shard` (FSDP2), tensor parallelism, or both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from lora_lightning.lora.adapter import is_distributed
from lora_lightning.lora.record import adapted_weights

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def full(value: Tensor) -> Tensor:
    """Gather a distributed tensor, and return any other tensor as it is. All processes have to call this."""
    return value.full_tensor() if is_distributed(value) else value


def local(value: Tensor) -> Tensor:
    """Return the local shard of a tensor."""
    return value.to_local() if is_distributed(value) else value


def distribute_adapters(module: nn.Module, group: ProcessGroup | None = None) -> None:
    """Prepare adapters that were attached after their weights were distributed.

    The values of the first process are taken. Over the mesh of tensor parallelism, A and B are replicated as
    distributed tensors, so that PyTorch adds up their gradients. Over that of `fully_shard`, they are replicated as
    well, and a hook averages their gradients. Adapters that were attached first have been distributed with the weights,
    and are left as they are. All processes have to call this.

    Args:
        module: An adapted module.
        group: The processes that `fully_shard` distributes over; `None` for all.
    """
    sharded = _inside_of_fully_shard(module)
    for found in adapted_weights(module):
        weight = found.weight
        if weight is None or not is_distributed(weight):
            continue
        if any(is_distributed(value) for value in found.adapter.parameters()):
            continue  # distributed with the weights
        for value in found.adapter.parameters():
            torch.distributed.broadcast(value.data, 0)
        mesh = _tensor_parallel_mesh(weight) if found.layer in sharded else weight.device_mesh
        if mesh is not None:
            found.adapter.replicate(mesh)
        if found.layer in sharded:
            for value in found.adapter.parameters():
                value.register_post_accumulate_grad_hook(_Average(group))  # type: ignore[no-untyped-call]


class _Average:
    """Averages a gradient over processes. Parts that were averaged before are kept, so gradients can be accumulated."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            gradient = local(parameter.grad)
            gradient /= torch.distributed.get_world_size(self.group)
            torch.distributed.all_reduce(gradient, group=self.group)


def _tensor_parallel_mesh(weight: DTensor) -> DeviceMesh | None:
    """Return the dimension of the mesh that `fully_shard` does not distribute over: the last of two."""
    mesh = weight.device_mesh
    if mesh.ndim == 1:
        return None
    assert mesh.mesh_dim_names is not None
    return mesh[mesh.mesh_dim_names[-1]]


def _inside_of_fully_shard(module: nn.Module) -> set[nn.Module]:
    from torch.distributed.fsdp import FSDPModule

    return {layer for child in module.modules() if isinstance(child, FSDPModule) for layer in child.modules()}
