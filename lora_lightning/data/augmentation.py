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
    """Return distorted images, which are samples without a class for distillation.

    Each image is distorted in one of three ways, with equal probabilities. In the first, it shows the maximum of parts of two images. Each
    part is mirrored or not, rotated by any angle, shifted by up to 3 pixels, scaled by up to 25 %, and cut along a random line or not. In the
    other two, the image is rotated by up to 15 degrees, shifted by up to 2 pixels and scaled by up to 15 %. Then it is cut along a random
    line, or gets a round hole. A nine without its left side looks like a seven, and one without its top like a four. The background
    should be darker than the objects.

    Args:
        images: Floating-point images of shape (B, C, H, W).
    """
    count, device = len(images), images.device
    background = images.amin((1, 2, 3), keepdim=True)
    two = torch.maximum(_part(images), _part(images[torch.randperm(count, device=device)]))
    moved = _moved(images, torch.rand(4, count, device=device) * 2 - 1, 15.0, 2.0, 0.15)
    cut = torch.where(_beside_line(images), moved, background)
    holed = torch.where(_in_hole(images), background, moved)
    way = torch.rand(count, 1, 1, 1, device=device) * 3
    return torch.where(way < 1, two, torch.where(way < 2, cut, holed))


def _part(images: Tensor) -> Tensor:
    draws = torch.rand(6, len(images), 1, 1, 1, device=images.device)
    mirrored = torch.where(draws[4] < 0.5, images.flip(3), images)
    moved = _moved(mirrored, draws[:4].flatten(1) * 2 - 1, 180.0, 3.0, 0.25)
    return torch.where(_beside_line(images) | (draws[5] < 0.5), moved, images.amin((1, 2, 3), keepdim=True))


def _beside_line(images: Tensor) -> Tensor:
    """Return a mask of one side of a line per image, of shape (B, 1, H, W)."""
    # The line is up to 6 of 28 pixels beyond the center or up to 2 before it, at any angle.
    down, right, draws = _coordinates(images)
    angle, offset = draws[0] * 2 * math.pi, (draws[1] * 8 - 2) / 14
    return right * angle.cos() + down * angle.sin() < offset


def _in_hole(images: Tensor) -> Tensor:
    """Return a mask of a disk per image, of shape (B, 1, H, W)."""
    # Its radius is 2.5 to 7.5 of 28 pixels, and its center up to 10 pixels from that of the image in each direction.
    down, right, draws = _coordinates(images)
    by_down, by_right = ((draws[:2] * 2 - 1) * 10 / 14).unbind()
    return (down - by_down) ** 2 + (right - by_right) ** 2 < ((2.5 + draws[2] * 5) / 14) ** 2


def _coordinates(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the coordinates from -1 to 1 of shapes (H, 1) and (W,), and three random numbers per image of shape (3, B, 1, 1, 1)."""
    *_, height, width = images.shape
    down, right = torch.linspace(-1, 1, height).to(images), torch.linspace(-1, 1, width).to(images)
    return down[:, None], right, torch.rand(3, len(images), 1, 1, 1, device=images.device)


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
