"""Low-rank factorisation: the best rank-r approximation of a matrix, and adapters made from it."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from lora_lightning.lora.adapter import adapted_layers, attach, attachment
from lora_lightning.lora.config import LoRAConfig


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of `matrix` as a product B A of the given rank, in the Frobenius norm.

    The truncated singular value decomposition (Eckart and Young, 1936); each factor takes the square root of the
    singular values, so that both have the same scale.

    Args:
        matrix: Of shape (out, in), floating-point.
        rank: From 1 to min(out, in).

    Returns:
        `(B, A)` of shapes (out, rank) and (rank, in), in the dtype of `matrix`, at least float32.

    Raises:
        ValueError: If `matrix` is not a floating-point matrix or `rank` is out of range.
    """
    if matrix.dim() != 2 or not matrix.is_floating_point():
        raise ValueError(
            f"Expected a floating-point matrix, got a tensor of shape {tuple(matrix.shape)} and {matrix.dtype}."
        )
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(
            f"rank={rank}: a matrix of shape {tuple(matrix.shape)} has a rank of 1 to {min(matrix.shape)}."
        )
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def extract(base: nn.Module, tuned: nn.Module, config: LoRAConfig) -> dict[str, float]:
    """Adapts `base` so that it answers as nearly as it can like `tuned`, a fully fine-tuned copy of it.

    Each adapter is the best approximation of its rank to the layer's change of weight. What lies outside the
    adapted weights (biases, other layers) is not carried over; a warning names what differs there.

    Args:
        base: The module before fine-tuning; it is frozen and adapted in place, as by `attach`.
        tuned: The module after it, with the same parameters and buffers.
        config: Which layers, at which rank. `init` is not used.

    Returns:
        For each adapted layer the part of its change that the adapter leaves out, ||ΔW - s B A|| / ||ΔW|| in the
        Frobenius norm: 0 where the adapter says it all, or where the weight did not change.

    Raises:
        ValueError: If the two modules differ in names or shapes, or as `attach` does.
    """
    before, after = base.state_dict(), tuned.state_dict()
    if {key: value.shape for key, value in before.items()} != {key: value.shape for key, value in after.items()}:
        differing = sorted(
            key
            for key in before.keys() | after.keys()
            if key not in before or key not in after or before[key].shape != after[key].shape
        )
        raise ValueError(
            f"base and tuned are not the same network: they differ in {differing}. Expected a model and its "
            "fine-tuned copy."
        )
    names = attach(base, config)
    left_out: dict[str, float] = {}
    for name, layer in adapted_layers(base).items():
        wide = layer.lora_A.dtype
        change = after[f"{name}.weight"].to(layer.lora_A) - layer.weight.detach().to(wide)
        up, down = low_rank(change, attachment(base).config.rank_of(name))
        with torch.no_grad():
            layer.lora_A.copy_(down)
            layer.lora_B.copy_(up / layer.lora_scaling)
            norm = change.norm()
            left_out[name] = float((change - layer.delta()).norm() / norm) if norm else 0.0
    adapted = {f"{name}.weight" for name in names}
    beyond = [key for key in before if key not in adapted and not torch.equal(before[key], after[key].to(before[key]))]
    if beyond:
        warnings.warn(f"The adapters carry weights of adapted layers alone; also different: {beyond}.", stacklevel=2)
    return left_out
