"""Low-rank factorisation: the best rank-r approximation of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor


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
