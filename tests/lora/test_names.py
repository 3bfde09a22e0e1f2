"""Names, ranks, scales and places: what is selected, what it is called, and what cannot be."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn

from lora_lightning import load_adapter, save_adapter
from lora_lightning.lora import (
    LoRAConfig,
    adapted_weights,
    adapter_names,
    adapter_parameters,
    adapter_state_dict,
    attach,
    detach,
    disabled,
    is_adapted,
    merge,
    merged,
    set_adapter,
)
from tests.helpers import same, state, stir


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 8)


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 1.0), (True, 8 / math.sqrt(8))])
def test_a_rank_that_is_lowered_keeps_the_scale(use_rslora: bool, scale: float) -> None:
    net = nn.Sequential(nn.Linear(20, 2))
    attach(net, LoRAConfig(rank=8, alpha=8, use_rslora=use_rslora))
    (weight,) = adapted_weights(net)
    assert weight.adapter.lora_A.shape == (2, 20)
    assert weight.adapter.scaling == pytest.approx(scale)


def test_a_lowered_rank_of_a_pattern_keeps_the_scale_of_its_own_alpha(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Linear(20, 2), nn.Linear(2, 20))
    attach(net, LoRAConfig(rank=1, rank_pattern={"1": 16}, alpha_pattern={"1": 4}))
    assert [weight.adapter.scaling for weight in adapted_weights(net)] == [1.0, 0.25]
    assert "'1' has 2 instead of 16" in caplog.text


def test_a_lowered_rank_is_the_same_after_a_folder(tmp_path: Path) -> None:
    net, other, x = nn.Sequential(nn.Linear(20, 2)), nn.Sequential(nn.Linear(20, 2)), torch.randn(3, 20)
    other.load_state_dict(net.state_dict())
    attach(net, LoRAConfig(rank=8, alpha=16))
    stir(net)
    save_adapter(net, tmp_path / "adapter")
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other(x), net(x))
    assert adapted_weights(other)[0].adapter.scaling == 2


class Gated(nn.Module):
    """Names things as adapters are named."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_gate = nn.Parameter(torch.ones(8))
        self.lora_A = nn.Linear(8, 8)
        self.lora_weight = nn.Linear(8, 4)
        self.register_buffer("lora_B", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.lora_weight(self.lora_A(x * self.lora_gate) * self.lora_B)
        return output


def test_names_of_the_user_that_look_like_ours_cause_no_harm(x: Tensor, tmp_path: Path) -> None:
    net, other = Gated(), Gated()
    other.load_state_dict(net.state_dict())
    base, before = net(x), state(net)
    assert attach(net, LoRAConfig(rank=2)) == ["lora_A", "lora_weight"]
    stir(net)
    assert len(adapter_parameters(net)) == 4
    assert set(adapter_state_dict(net)) == {
        f"{layer}.lora_weight.default.{factor}"
        for layer in ("lora_A", "lora_weight")
        for factor in ("lora_A", "lora_B")
    }
    assert not net.lora_gate.requires_grad
    save_adapter(net, tmp_path / "adapter")
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other(x), net(x))
    with disabled(net):
        assert torch.equal(net(x), base)
    detach(net)
    assert same(state(net), before)


@pytest.mark.parametrize("attribute", ["parameter", "buffer", "module", "value", "method"])
def test_a_layer_that_has_our_name_is_refused_before_anything_changes(attribute: str) -> None:
    class Own(nn.Linear):
        """A layer of the user."""

    layer = Own(8, 4)
    if attribute == "method":
        Own.lora_weight = lambda self: 3  # type: ignore[attr-defined]
    elif attribute == "buffer":
        layer.register_buffer("lora_weight", torch.ones(3))
    else:
        value = {"parameter": nn.Parameter(torch.ones(3)), "module": nn.ReLU(), "value": 3}[attribute]
        setattr(layer, "lora_weight", value)  # noqa: B010  # the class has no such attribute
    net = nn.Sequential(nn.Linear(8, 8), layer)
    before = state(net)
    with pytest.raises(ValueError, match=r"Layer '1' has an attribute 'lora_weight' of its own.*Rename it, or leave"):
        attach(net, LoRAConfig(rank=2))
    assert same(state(net), before)
    assert type(net[0]) is nn.Linear
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert attach(net, LoRAConfig(rank=2, exclude_modules=["1"])) == ["0"]


@pytest.mark.parametrize("name", ["", "v1.0", "train", "forward", "active", "kind", "names", "training", "in_effect"])
def test_what_cannot_be_the_name_of_adapters_is_refused_before_anything_changes(name: str) -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"cannot be the name of adapters.*use letters, digits and underscores"):
        attach(net, LoRAConfig(rank=2), name=name)
    assert [type(layer) for layer in net] == [nn.Linear, nn.BatchNorm1d]
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("name", ["keys", "items", "v1", "lora_A", "weight", "digit 9", "größe", "a/b"])
def test_any_other_name_works(name: str, x: Tensor, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 4))
    attach(net, LoRAConfig(rank=2), name=name)
    stir(net)
    want = net(x)
    attach(net, LoRAConfig(rank=1), name="other")
    assert adapter_names(net) == ["other", name]
    set_adapter(net, name)
    assert torch.equal(net(x), want)
    assert len(adapter_state_dict(net, name)) == 2
    save_adapter(net, tmp_path / "adapter")
    detach(net)
    load_adapter(net, tmp_path / "adapter")
    assert torch.equal(net(x), want)


def test_attach_to_a_layer_whose_class_cannot_have_subclasses_changes_nothing() -> None:
    class Final(nn.Linear):
        """A layer of the user."""

        def __init_subclass__(cls) -> None:
            raise TypeError("This class is final.")

    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), Final(8, 4))
    before = state(net)
    with pytest.raises(TypeError, match="This class is final"):
        attach(net, LoRAConfig(rank=2))
    assert same(state(net), before)
    assert [type(layer) for layer in net] == [nn.Linear, nn.BatchNorm1d, Final]
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not is_adapted(net)


class TestDevices:
    """A layer on another device, and layers with hooks of accelerate."""

    def test_a_second_attach_works_when_the_first_layer_is_elsewhere(self, x: Tensor) -> None:
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        attach(net, LoRAConfig(rank=2), name="first")
        stir(net)
        first = [parameter.clone() for parameter in adapter_parameters(net)]
        net[0].to("meta")
        attach(net, LoRAConfig(rank=2, target_modules=["1"]), name="second")
        assert [weight.name for weight in adapted_weights(net)] == ["1"]
        set_adapter(net, "first")
        devices = [parameter.device.type for parameter in adapter_parameters(net)]
        assert devices == ["meta", "meta", "cpu", "cpu"]
        assert same([parameter.detach() for parameter in adapter_parameters(net)[2:]], first[2:])

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_layers_with_hooks_of_accelerate_are_adapted_with_dropout(self, dropout: float, x: Tensor) -> None:
        hooks = pytest.importorskip("accelerate.hooks")
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        base = net(x)
        for layer in net:
            hooks.add_hook_to_module(layer, hooks.ModelHook())
        attach(net, LoRAConfig(rank=2, dropout=dropout))
        assert torch.equal(net.eval()(x), base)
        stir(net, 1)
        assert not torch.equal(net(x), base)
        net.train()(x).sum().backward()
        assert all(parameter.grad is not None for parameter in adapter_parameters(net))
        merge(net)
        for layer in net:
            hooks.remove_hook_from_module(layer)
        assert type(net[0]) is nn.Linear

    def test_hooks_of_accelerate_that_are_removed_while_adapted_leave_an_adapted_layer(self, x: Tensor) -> None:
        hooks = pytest.importorskip("accelerate.hooks")
        net = nn.Sequential(nn.Linear(8, 4))
        hooks.add_hook_to_module(net[0], hooks.ModelHook())
        attach(net, LoRAConfig(rank=2))
        stir(net, 1)
        want = net(x)
        hooks.remove_hook_from_module(net[0])
        assert torch.equal(net(x), want)
        detach(net)
        assert not torch.equal(net(x), want)
        attach(net, LoRAConfig(rank=2))
        hooks.add_hook_to_module(net[0], hooks.ModelHook())
        detach(net)
        net(x)

    def test_an_offloaded_layer_is_refused_at_attach(self, x: Tensor) -> None:
        accelerate = pytest.importorskip("accelerate")
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        accelerate.cpu_offload(net, execution_device="cpu")
        with pytest.raises(ValueError, match=r"Layer '0' is offloaded: .* Load the model without offloading"):
            attach(net, LoRAConfig(rank=2))


class TestPlaces:
    """Where the layer is the only child, an alias, the module itself, or in two places."""

    def test_the_one_layer_of_a_lightning_module_is_adapted_by_its_name(self) -> None:
        model = BoringModel()
        x = torch.randn(2, 32)
        base = model(x)
        assert attach(model, LoRAConfig(rank=1, target_modules=["layer"])) == ["layer"]
        stir(model, 1)
        assert set(adapter_state_dict(model)) == {f"layer.lora_weight.default.lora_{factor}" for factor in "AB"}
        assert not torch.equal(model(x), base)
        detach(model)
        assert torch.equal(model(x), base)

    @pytest.mark.parametrize("target", ["encoder.0", "net.encoder.0", "0"])
    def test_an_alias_of_a_part_is_adapted_once(self, target: str, x: Tensor) -> None:
        class Aliased(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(8, 4))})
                self.encoder = self.net["encoder"]

            def forward(self, x: Tensor) -> Tensor:
                output: Tensor = self.encoder(x)
                return output

        net = Aliased()
        base = net(x)
        assert attach(net, LoRAConfig(rank=2, target_modules=[target])) == ["net.encoder.0"]
        stir(net, 1)
        (weight,) = adapted_weights(net)
        assert torch.allclose(net(x), base + x @ weight.adapter.product().T, atol=1e-6)
        detach(net)
        assert torch.equal(net(x), base)

    def test_a_layer_in_two_places_is_adapted_once_and_merged_once(self, x: Tensor) -> None:
        layer = nn.Linear(8, 8)
        net = nn.Sequential(layer, nn.ReLU(), layer)
        assert attach(net, LoRAConfig(rank=2)) == ["0"]
        stir(net, 1)
        want = net(x)
        with merged(net):
            assert torch.allclose(net(x), want, atol=1e-5)
        merge(net)
        assert torch.allclose(net(x), want, atol=1e-5)

    def test_a_layer_that_is_the_module_itself(self, x: Tensor) -> None:
        layer = nn.Linear(8, 4)
        base = layer(x)
        assert attach(layer, LoRAConfig(rank=2)) == [""]
        stir(layer)
        assert set(adapter_state_dict(layer)) == {f"lora_weight.default.lora_{factor}" for factor in "AB"}
        detach(layer)
        assert torch.equal(layer(x), base)
        assert type(layer) is nn.Linear
