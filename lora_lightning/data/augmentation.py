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

    The whole batch is transformed at once on its device, with the global random generator of the device. Pixels are interpolated
    bilinearly, and the border is repeated outside the image.

    Args:
        images: Floating-point images of shape (B, C, H, W).
    """
    return _moved(images, torch.rand(4, len(images), device=images.device) * 2 - 1, _ROTATION, _SHIFT, _SCALE)


def distort(images: Tensor) -> Tensor:
    """Return images that show parts of two of the images at once, which are mirrored, rotated by any angle and cut at random.

    They are samples without a class for distillation. Each part is shifted by up to 3 pixels and scaled by up to 25 %. Half of the parts are
    cut along a random line. The maximum of both parts is returned, so the background should be darker than the objects.

    Args:
        images: Floating-point images of shape (B, C, H, W).
    """
    return torch.maximum(_part(images), _part(images[torch.randperm(len(images), device=images.device)]))


def _part(images: Tensor) -> Tensor:
    count, _, height, width = images.shape
    draws = torch.rand(8, count, device=images.device)
    mirrored = torch.where((draws[4] < 0.5)[:, None, None, None], images.flip(3), images)
    moved = _moved(mirrored, draws[:4] * 2 - 1, 180.0, 3.0, 0.25)
    # The line is up to 6 of 28 pixels beyond the center or up to 2 before it, at any angle.
    angle, offset = draws[5] * 2 * math.pi, (draws[6] * 8 - 2) / 14
    down, right = torch.linspace(-1, 1, height).to(images), torch.linspace(-1, 1, width).to(images)
    along = right * angle.cos()[:, None, None] + down[:, None] * angle.sin()[:, None, None]
    kept = (along < offset[:, None, None]) | (draws[7] < 0.5)[:, None, None]
    return torch.where(kept[:, None], moved, images.amin((1, 2, 3), keepdim=True))


def _moved(images: Tensor, draws: Tensor, rotation: float, shift: float, scale: float) -> Tensor:
    """Rotate, scale and shift by fractions from -1 to 1 of these degrees, pixels and factors; `draws` has the shape (4, B)."""
    _, _, height, width = images.shape
    angle, zoom = draws[0] * math.radians(rotation), 1 + draws[1] * scale
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    # In coordinates from -1 to 1; a pixel is 2 / width wide.
    right, down = draws[2] * 2 * shift / width, draws[3] * 2 * shift / height
    rows = torch.stack([cosine, -sine, right]), torch.stack([sine, cosine, down])
    grid = _grid(torch.stack(rows).permute(2, 0, 1).to(images.dtype), height, width)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _grid(matrices: Tensor, height: int, width: int) -> Tensor:
    """Return `F.affine_grid` for matrices of shape (B, 2, 3), without its batched product, which takes most of the time on a CPU."""
    identity = torch.eye(2, 3, dtype=matrices.dtype, device=matrices.device)
    x, y = F.affine_grid(identity[None], [1, 1, height, width], align_corners=False)[0].movedim(2, 0)
    by_x, by_y, by_one = matrices[..., None, None].unbind(2)
    grid: Tensor = (by_x * x).add_(by_y * y).add_(by_one)
    return grid.movedim(1, 3)


def seed_of_sample(epoch: int, index: int) -> int:
    """Return the seed for augmenting a sample, as a function of the seed of the run, the epoch and the index of the sample."""
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
