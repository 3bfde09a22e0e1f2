"""Random changes of training images that leave their class as it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_ROTATION, _SHIFT, _SCALE = 6.0, 1.0, 0.05


def jitter(images: Tensor) -> Tensor:
    """Rotate each image by up to 6 degrees, shift it by up to 1 pixel, and scale it by up to 5 %, uniformly at random.

    The whole batch is changed at once, on its device, with the device's global random numbers. Pixels are interpolated
    bilinearly; what comes in from outside repeats the border.

    Args:
        images: Shape (B, C, H, W), floating-point.
    """
    count, _, height, width = images.shape
    draws = torch.rand(4, count, device=images.device) * 2 - 1
    angle, zoom = draws[0] * math.radians(_ROTATION), 1 + draws[1] * _SCALE
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    # In coordinates from -1 to 1; a pixel is 2 / width wide.
    right, down = draws[2] * 2 * _SHIFT / width, draws[3] * 2 * _SHIFT / height
    rows = torch.stack([cosine, -sine, right]), torch.stack([sine, cosine, down])
    grid = F.affine_grid(torch.stack(rows).permute(2, 0, 1).to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
