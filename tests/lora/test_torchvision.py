"""Every classification architecture of torchvision, adapted in all layers that can be."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lora_lightning import LoRAConfig
from lora_lightning.lora import adapter_parameters, attach, base_fingerprint, detach, merged, verify_adapters

SIZES = {"inception_v3": 299, "swin_v2_b": 64, "swin_v2_s": 64, "swin_v2_t": 64}
FIXED = {"vit": {"image_size": 32}, "maxvit": {"input_size": (224, 224)}}
OPTIONS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
FAST = {
    "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "mnasnet0_5", "googlenet",
    "regnet_y_400mf",
}  # fmt: skip
NAMES = [
    pytest.param(name, marks=pytest.mark.smoke if name == "resnet18" else [] if name in FAST else pytest.mark.slow)
    for name in torchvision.models.list_models(module=torchvision.models)
]


def build(name: str) -> nn.Module:
    """The network with random weights; no dropout, which would tell nothing here."""
    options = next((FIXED[key] for key in FIXED if name.startswith(key)), {}) | OPTIONS.get(name, {})
    if name.startswith("vit_h"):
        options = {"image_size": 28}
    return torchvision.models.get_model(name, weights=None, num_classes=10, **options)


def images(name: str) -> Tensor:
    size = 224 if name.startswith("maxvit") else 28 if name.startswith("vit_h") else SIZES.get(name, 64)
    size = 32 if name.startswith("vit") and not name.startswith("vit_h") else size
    return torch.randn(2, 3, size, size)


def logits(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_keeps_all_promises(name: str) -> None:
    net, x = build(name), images(name)
    # The auxiliary heads answer in training alone, so an adapter there is inert in evaluation, and verify says so.
    config = LoRAConfig(rank=1, exclude_modules=r"(aux.*|AuxLogits.*)")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    types = [type(layer) for layer in net.modules()]
    with torch.no_grad():
        base = net.eval()(x)
    names = attach(net, config)
    linear_and_convolutions = [
        key
        for key, layer in net.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and not key.lower().startswith("aux")
    ]
    assert set(linear_and_convolutions) <= set(names)

    with torch.no_grad():
        assert torch.equal(net(x), base), "zero B is not the identity"
    verify_adapters(net, x)
    digest = base_fingerprint(net)

    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        logits(net(x)).square().mean().backward()
        optimizer.step()
    trained = {key for key, parameter in net.named_parameters() if parameter.grad is not None}
    assert trained == {key for key, parameter in net.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * len(names)
    assert base_fingerprint(net) == digest
    after = net.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    del before, after  # gigabytes, for the largest

    with torch.no_grad():
        for parameter in adapter_parameters(net):
            parameter.normal_(std=0.05)
        net.double().eval()
        y = net(x.double())
        with merged(net):
            difference = (net(x.double()) - y).norm() / y.norm()
        assert difference < 1e-5
        assert not torch.allclose(y, base.double(), rtol=1e-9, atol=0)
    detach(net)
    assert [type(layer) for layer in net.modules()] == types
    net.float()
    with torch.no_grad():
        assert torch.equal(net(x), base)
