"""Random augmentations of training samples."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor
from torch.nn import functional as F

_PRIME = 1_000_003
_ROTATION, _SHIFT, _SCALE = 6.0, 1.0, 0.05


def jitter(images: Tensor) -> Tensor:
    """Rotate each image by up to 6 degrees, shift it by up to 1 pixel, and scale it by up to 5 %, uniformly at random.

    The whole batch is transformed at once on its device, with the global random generator of the device. Pixels are
    interpolated bilinearly, and the border is repeated outside the image.

    Args:
        images: Floating-point images of shape (B, C, H, W).
    """
    _, _, height, width = images.shape
    draws = torch.rand(4, len(images), device=images.device) * 2 - 1
    angle, zoom = draws[0] * math.radians(_ROTATION), 1 + draws[1] * _SCALE
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    # In coordinates from -1 to 1; a pixel is 2 / width wide.
    right, down = draws[2] * 2 * _SHIFT / width, draws[3] * 2 * _SHIFT / height
    rows = torch.stack([cosine, -sine, right]), torch.stack([sine, cosine, down])
    grid = _grid(torch.stack(rows).permute(2, 0, 1).to(images.dtype), height, width)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _grid(matrices: Tensor, height: int, width: int) -> Tensor:
    """Return `F.affine_grid` for matrices of shape (B, 2, 3), without its batched product, which is slow on a CPU."""
    identity = torch.eye(2, 3, dtype=matrices.dtype, device=matrices.device)
    x, y = F.affine_grid(identity[None], [1, 1, height, width], align_corners=False)[0].movedim(2, 0)
    by_x, by_y, by_one = matrices[..., None, None].unbind(2)
    grid: Tensor = (by_x * x).add_(by_y * y).add_(by_one)
    return grid.movedim(1, 3)


def seed_of_sample(epoch: int, index: int) -> int:
    """Return the seed for augmenting a sample, a function of the seed of the run, the epoch and the index."""
    seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
    return ((seed * _PRIME + epoch) * _PRIME + index) % 2**63


def drop_tokens(tokens: Tensor, special: Tensor, share: float, replacement: int, seed: int) -> Tensor:
    """Replace each token with the probability `share`. Special tokens are kept.

    Args:
        tokens: Token ids of shape (T,), int64.
        special: Mask of special tokens, such as the first and the last one, of shape (T,), bool.
        share: Probability between 0 and 1.
        replacement: The token that replaces a dropped one.
        seed: Seed for choosing the dropped tokens.
    """
    drawn = torch.rand(len(tokens), generator=torch.Generator().manual_seed(seed))
    return torch.where((drawn < share) & ~special, replacement, tokens)
