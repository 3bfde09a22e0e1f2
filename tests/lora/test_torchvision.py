"""Every classification architecture of torchvision, adapted in all layers that can be."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lora_lightning import (
    LoRAConfig,
    adapter_parameters,
    attach,
    detach,
    disabled,
    fingerprint,
    merged,
)
from lora_lightning.lora.attached import sites

SIZES = {"inception_v3": 96, "swin_v2_b": 64, "swin_v2_s": 64, "swin_v2_t": 64}
FIXED = {"vit": {"image_size": 32}, "maxvit": {"input_size": (224, 224)}}
OPTIONS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
FAST = {
    "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "mnasnet0_5", "alexnet", "googlenet",
    "regnet_y_400mf", "efficientnet_b0", "swin_t", "vit_b_32", "densenet121", "convnext_tiny",
}  # fmt: skip
NAMES = [
    pytest.param(name, marks=[] if name in FAST else pytest.mark.slow)
    for name in torchvision.models.list_models(module=torchvision.models)
]
