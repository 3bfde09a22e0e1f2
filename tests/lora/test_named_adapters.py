"""Named adapters on one base: switched without a trace, summed exactly."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_lightning import LoRAConfig, load_adapter, save_adapter
from lora_lightning.lora import (
    adapter_names,
    adapter_parameters,
    adapter_state_dict,
    add_weighted_adapter,
    attach,
    base_fingerprint,
    detach,
    disabled,
    merge,
    set_adapter,
)
from tests.helpers import stir


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(16, dtype=torch.float64)
        self.lstm = nn.LSTM(16, 5, dtype=torch.float64)
        self.head = nn.Linear(5, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).flatten(2).mT.flatten(1)) if x.dim() == 4 else x
        return self.head(self.lstm(y)[0])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, 4, 4, dtype=torch.float64)


@pytest.fixture
def net(x: Tensor) -> Net:
    return Net().eval()


A = LoRAConfig(rank=2, alpha=3)
B = LoRAConfig(rank=1, target_modules=["conv", "lstm.weight_ih_l0"], init="pissa")
C = LoRAConfig(rank=3, target_modules=["head"], use_rslora=True, bypass=(48, 4))


def test_each_answers_as_if_it_were_alone(net: Net, x: Tensor) -> None:
    plain, digest, answers = copy.deepcopy(net), base_fingerprint(net), {}
    for name, config in {"a": A, "b": B, "dora": LoRAConfig(rank=1, use_dora=True), "c": C}.items():
        alone = copy.deepcopy(plain)
        torch.manual_seed(len(answers))
        attach(alone, config)
        stir(alone, 0.3)
        torch.manual_seed(len(answers))
        attach(net, config, name=name)
        stir(net, 0.3)
        answers[name] = alone(x)
        assert torch.equal(net(x), answers[name])
    assert adapter_names(net) == ["c", "a", "b", "dora"]
    for name in ("b", "b", "a", "c", "dora", "a"):
        set_adapter(net, name)
        assert torch.equal(net(x), answers[name])
        assert base_fingerprint(net) == digest
        with disabled(net):
            assert torch.equal(net(x), plain(x))
    other = copy.deepcopy(net)
    set_adapter(other, "dora")
    assert torch.equal(other(x), answers["dora"])
    merge(other)
    torch.testing.assert_close(other(x), answers["dora"])
    detach(net)
    assert torch.equal(net(x), plain(x))
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_the_module_holds_every_adapter_and_only_the_active_ones_are_trained(net: Net) -> None:
    attach(net, A, name="a")
    alone = set(net.state_dict())
    attach(net, B, name="b")
    set_adapter(net, "a")
    added = set(net.state_dict()) - alone
    assert added == set(adapter_state_dict(net, "b"))
    assert {key.split(".")[-2] for key in added} == {"b"}
    assert set(adapter_state_dict(net)) == set(adapter_state_dict(net, "a"))
    trained = {key for key, value in net.named_parameters() if value.requires_grad}
    assert trained == set(adapter_state_dict(net, "a"))
    assert {id(value) for value in adapter_parameters(net)} == {id(net.get_parameter(key)) for key in trained}
    with pytest.raises(ValueError, match="no adapters named 'c'"):
        adapter_state_dict(net, "c")


def test_an_optimizer_goes_on_with_the_adapter_that_it_was_made_for(net: Net, x: Tensor) -> None:
    attach(net, A, name="a")
    optimizer = torch.optim.SGD(adapter_parameters(net), lr=0.1)
    attach(net, B, name="b")
    b = {key: value.clone() for key, value in adapter_state_dict(net).items()}
    set_adapter(net, "a")
    a = {key: value.clone() for key, value in adapter_state_dict(net).items()}
    net(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(adapter_state_dict(net)["head.lora_weight.a.lora_B"], a["head.lora_weight.a.lora_B"])
    set_adapter(net, "b")
    assert all(torch.equal(adapter_state_dict(net)[key], value) for key, value in b.items())


def test_a_weighted_sum_is_exact_over_different_layers_ranks_and_scales(net: Net, x: Tensor) -> None:
    base = {key: value.clone() for key, value in net.state_dict().items()}
    changes: dict[str, dict[str, Tensor]] = {}
    for name, config in {"a": A, "b": B}.items():
        attach(net, config, name=name)
        stir(net, 0.3)
        merged_net = copy.deepcopy(net)
        merge(merged_net)
        changes[name] = {key: value - base[key] for key, value in merged_net.state_dict().items()}
    add_weighted_adapter(net, {"a": 0.7, "b": -0.4}, name="sum")
    oracle = Net().eval()
    oracle.load_state_dict({key: base[key] + 0.7 * changes["a"][key] - 0.4 * changes["b"][key] for key in base})
    assert adapter_names(net)[0] == "sum"
    torch.testing.assert_close(net(x), oracle(x))


def test_a_sum_with_a_bypass_is_saved_and_loaded_like_any_other(net: Net, x: Tensor, tmp_path: Path) -> None:
    base = copy.deepcopy(net)
    attach(net, A, name="a")
    stir(net, 0.3)
    attach(net, C, name="c")
    stir(net, 0.3)
    add_weighted_adapter(net, {"a": 1.0, "c": 0.5}, name="sum")
    save_adapter(net, tmp_path)
    load_adapter(base, tmp_path, name="loaded")
    assert torch.equal(base(x), net(x))
    attach(base, A, name="other")
    stir(base, 0.3)
    load_adapter(base, tmp_path, name="loaded")
    assert adapter_names(base) == ["loaded", "other"]
    assert torch.equal(base(x), net(x))


@pytest.mark.parametrize(
    ("weights", "name", "message"),
    [
        ({"a": 1.0, "z": 1.0}, "sum", r"Cannot combine \['a', 'z'\] as 'sum': this Net has adapters named dora, a"),
        ({"a": 1.0}, "dora", r"Cannot combine \['a'\] as 'dora'"),
        ({"a": 1.0, "dora": 1.0}, "sum", r"'dora' cannot be added: they use DoRA"),
    ],
)
def test_what_can_not_be_summed_is_named_and_nothing_changes(
    net: Net, x: Tensor, weights: dict[str, float], name: str, message: str
) -> None:
    attach(net, A, name="a")
    attach(net, LoRAConfig(rank=1, use_dora=True), name="dora")
    stir(net, 0.3)
    y = net(x)
    with pytest.raises(ValueError, match=message):
        add_weighted_adapter(net, weights, name)
    assert adapter_names(net) == ["dora", "a"]
    assert torch.equal(net(x), y)


def test_an_unknown_or_taken_name_is_refused(net: Net) -> None:
    attach(net, A, name="a")
    with pytest.raises(ValueError, match="Net has no adapters named 'z'; it has a"):
        set_adapter(net, "z")
    with pytest.raises(ValueError, match=r"already has adapters on .*, or give the new adapters another name"):
        attach(net, B, name="a")
    with pytest.raises(ValueError, match="'nowhere'"):
        attach(net, LoRAConfig(target_modules=["nowhere"]), name="b")
    assert adapter_names(net) == ["a"]


class TestTrainable:
    """Modules trained in full beside the adapters."""

    CONFIG = LoRAConfig(rank=2, target_modules=["conv", "lstm"], modules_to_save=["head", "norm"])

    def test_they_train_and_the_rest_stays(self, net: Net, x: Tensor) -> None:
        before = {key: value.clone() for key, value in net.state_dict().items()}
        attach(net, self.CONFIG)
        digest = base_fingerprint(net)
        assert {name for name, p in net.named_parameters() if p.requires_grad} == {
            key for key in adapter_state_dict(net) if not key.startswith(("norm.running", "norm.num"))
        }
        optimizer = torch.optim.SGD(adapter_parameters(net), lr=0.1)
        net.train()
        net(x).square().sum().backward()
        optimizer.step()
        changed = {key for key, value in before.items() if not torch.equal(net.state_dict()[key], value)}
        assert changed == {key for key in before if key.startswith(("head.", "norm."))}
        assert base_fingerprint(net) == digest

    def test_disabled_and_detach_bring_the_original_back(self, net: Net, x: Tensor) -> None:
        y = net(x)
        before = {key: value.clone() for key, value in net.state_dict().items()}
        attach(net, self.CONFIG)
        head = net.head.weight
        stir(net, 0.3)
        net.train()(x)
        net.eval()
        adapted = net(x)
        assert not torch.allclose(adapted, y)
        with disabled(net), disabled(net):
            torch.testing.assert_close(net(x), y)
        assert net.head.weight is head
        assert torch.equal(net(x), adapted)
        other = copy.deepcopy(net)
        merge(other)
        torch.testing.assert_close(other(x), adapted)
        detach(net)
        assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())

    def test_each_adapter_has_its_own(self, net: Net, x: Tensor) -> None:
        y = net(x)
        attach(net, self.CONFIG, name="a")
        stir(net, 0.3)
        a = net(x)
        attach(net, LoRAConfig(rank=1, target_modules=["conv"], modules_to_save=["head"]), name="b")
        torch.testing.assert_close(net(x), y)
        mean = net.norm.running_mean.clone()
        net.train()(x)
        assert torch.equal(net.norm.running_mean, mean)
        assert not net.norm.weight.requires_grad
        net.eval()
        stir(net, 0.3)
        b = net(x)
        set_adapter(net, "a")
        assert torch.equal(net(x), a)
        assert net.norm.weight.requires_grad
        set_adapter(net, "b")
        assert torch.equal(net(x), b)

    def test_one_that_is_not_there_is_refused(self, net: Net) -> None:
        with pytest.raises(ValueError, match=r"modules_to_save: \['tail'\] match no module. There are: conv"):
            attach(net, LoRAConfig(rank=1, modules_to_save=["tail"]))
