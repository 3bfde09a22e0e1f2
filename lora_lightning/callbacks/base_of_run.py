"""Loads the base of a run, or says that the model is used as it is."""

from __future__ import annotations

import math
import os
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lora_lightning.checkpoints import load_base, newest_checkpoint


def load_base_of_run(
    pl_module: LightningModule, base_checkpoint: str | os.PathLike[str], weights_only: bool | None
) -> Path:
    """Load a checkpoint, or the newest one of a log folder, into a model without adapters, and return its path."""
    path = newest_checkpoint(base_checkpoint)
    rank_zero_info(f"Base: {path}")
    load_base(pl_module, path, weights_only)
    return path


def say_that_the_model_is_the_base(trainer: Trainer, pl_module: LightningModule) -> None:
    """Say that there is no checkpoint of the base, and ask before training if it seems to be untrained."""
    question = ""
    if trainer.state.fn == "fit" and is_as_created(pl_module):
        question = " They are as PyTorch creates them: is an untrained base meant?"
    rank_zero_info(f"Base: the weights that the model has now, since no base_checkpoint is given.{question}")


def is_as_created(module: nn.Module) -> bool:
    """Return whether all linear layers, convolutions and batch norms have values as PyTorch initializes them.

    Layers with another initialization are taken for trained ones.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | _ConvNd)]
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    if norms:
        return all(map(_has_no_statistics, norms))
    return bool(layers) and all(map(_has_first_weights, layers))


def _has_no_statistics(norm: _BatchNorm) -> bool:
    mean, variance = norm.running_mean, norm.running_var
    return mean is not None and variance is not None and not bool(mean.any()) and bool((variance == 1).all())


def _has_first_weights(layer: nn.Linear | _ConvNd) -> bool:
    """Return whether the weights are uniformly distributed below 1 / sqrt(fan_in), as in `reset_parameters`."""
    weight = layer.weight.detach()
    is_plain = type(weight) is Tensor and not weight.is_meta and weight.is_floating_point()
    if not is_plain or weight.dim() < 2:  # quantized, distributed, or not there yet
        return False
    bound = 1 / math.sqrt(weight[0].numel())
    if float(weight.abs().max()) > bound * 1.01:  # rounded to half precision
        return False
    return weight.numel() < 32 or abs(float(weight.float().std()) * math.sqrt(3) / bound - 1) < 0.2
