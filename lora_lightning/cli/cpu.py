"""Sets two options of the process that make training small models on a CPU several times faster."""

from __future__ import annotations

import os

import torch


def tune_for_cpu() -> None:
    """Speed up training on a CPU. Call this before using PyTorch.

    - Denormal numbers are set to zero. Adam's moments of weights without gradients (pixels that are always black, units
      that are always off) decay to denormal numbers, and computing with these is several times slower.
    - Without a GPU, PyTorch uses a faster check for one. `torch.optim` checks in every step, and Lightning configures
      this check to search the disk for the NVIDIA management library, which takes 0.1 ms per step.
    """
    torch.set_flush_denormal(True)
    if not torch.cuda.is_available():
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
