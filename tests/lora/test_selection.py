"""What a configuration selects, and what is said of the rest."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lora_lightning.lora import (
    LoRAConfig,
    adapter_names,
    adapter_parameters,
    attach,
    detach,
    disabled,
    is_adapted,
    set_adapter,
)
from tests.helpers import same, state, stir


class OwnNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm() * self.weight


class TensorProduct(nn.Module):
    """Keeps the entries of several matrices in one dimension, as e3nn does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.view(4, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(5, 4))
        self.product = TensorProduct()
        self.norms = nn.Sequential(OwnNorm(), nn.LayerNorm(4))
        self.mix = nn.Bilinear(4, 4, 4)
        self.linear = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms(self.product(x + self.position))
        return self.head(self.linear(self.mix(x, x)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def said(caplog: pytest.LogCaptureFixture) -> str:
    return " ".join(record.getMessage() for record in caplog.records)


def trained(net: nn.Module) -> set[str]:
    net(torch.randn(3, 5, 4)).square().sum().backward()
    return {name for name, value in net.named_parameters() if value.grad is not None and value.grad.any()}


def test_what_all_leaves_out_is_said_and_the_way_out_works(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    attach(net, LoRAConfig(rank=2))
    assert "position, mix.weight stay frozen" in said(caplog)
    assert "target_parameters" in said(caplog)
    detach(net)
    caplog.clear()
    attach(net, LoRAConfig(rank=2, target_parameters=["position", "mix.weight"]))
    assert "position" not in said(caplog)
    assert {f"{layer}.default.lora_B" for layer in ("lora_position", "mix.lora_weight")} <= trained(net)


def test_weights_of_one_dimension_are_said_and_the_way_out_works(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    attach(net, LoRAConfig(rank=2))
    flat = next(record.getMessage() for record in caplog.records if "one dimension" in record.getMessage())
    assert "product.weight stay frozen" in flat
    assert "modules_to_save" in flat
    assert "target_parameters" not in flat
    assert "norms" not in flat
    detach(net)
    caplog.clear()
    attach(net, LoRAConfig(rank=2, modules_to_save=["product"]))
    assert "one dimension" not in said(caplog)
    assert "product.weight" in trained(net)


def test_a_weight_of_one_dimension_by_name_is_refused_with_a_way_out(net: Net) -> None:
    with pytest.raises(ValueError, match=r"'product.weight' is of shape \(16,\).*modules_to_save"):
        attach(net, LoRAConfig(rank=2, target_parameters=["product.weight"]))
    assert not is_adapted(net)


BY_LAYER, BY_NAME = LoRAConfig(rank=2), LoRAConfig(rank=2, target_modules=[], target_parameters=["0.weight"])


@pytest.mark.parametrize(
    ("layer", "first", "second", "message"),
    [
        (nn.Linear(4, 4), BY_NAME, replace(BY_LAYER, dropout=0.5), "'0' has adapters .* target_parameters"),
        (nn.Embedding(5, 4), BY_LAYER, BY_NAME, r"'0\.weight' has adapters .* target_modules"),
    ],
    ids=["as a parameter first", "as a layer first"],
)
def test_a_weight_that_is_adapted_as_a_layer_and_as_a_parameter_is_refused_before_anything_changes(
    layer: nn.Module, first: LoRAConfig, second: LoRAConfig, message: str
) -> None:
    net = nn.Sequential(layer)
    attach(net, first, name="first")
    before = state(net)
    with pytest.raises(ValueError, match=message):
        attach(net, second, name="second")
    assert same(state(net), before)
    attach(net, first, name="second")
    assert adapter_names(net) == ["second", "first"]


def test_nothing_is_said_where_all_reaches_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    attach(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 4)), LoRAConfig(rank=2))
    assert not caplog.records


def test_other_code_sees_a_weight_that_requires_gradients_only_where_an_adapter_gets_them(net: Net) -> None:
    attach(net, LoRAConfig(rank=2, target_modules=["linear"]), name="first")
    attach(net, LoRAConfig(rank=2, target_modules=["head"]), name="second")
    stir(net)
    seen = {"linear": net.linear, "head": net.head}
    assert {name: layer.weight.requires_grad for name, layer in seen.items()} == {"linear": False, "head": True}
    with disabled(net):
        assert not net.head.weight.requires_grad
    with torch.no_grad():
        assert not net.head.weight.requires_grad
    set_adapter(net, "first")
    assert {name: layer.weight.requires_grad for name, layer in seen.items()} == {"linear": True, "head": False}
    net.linear.weight.square().sum().backward()
    assert all(value.grad is not None for value in adapter_parameters(net))
