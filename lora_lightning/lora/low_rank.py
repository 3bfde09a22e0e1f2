"""Approximates a matrix by a low-rank one."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the best approximation B A of `matrix` at this rank, in the Frobenius norm.

    This is the truncated singular value decomposition (Eckart and Young, 1936). Both factors contain the square roots
    of the singular values, so they have the same scale.

    Args:
        matrix: A floating-point matrix of shape (out, in).
        rank: A rank between 1 and min(out, in).

    Returns:
        `(A, B)` of shapes (rank, in) and (out, rank), in the dtype of `matrix` but at least float32.

    Raises:
        ValueError: If `matrix` is not a floating-point matrix, or `rank` is out of range.
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
    return root[:, None] * vh[:rank], u[:, :rank] * root
