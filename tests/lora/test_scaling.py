"""W + λ ΔW: adapters scaled for a while, and for good."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, load_adapter, save_adapter
from lora_lightning.lora import adapter_state_dict, attach, bare, disabled, merge, scale_adapter, scaled
from tests.helpers import same, state, stir

CONFIGS = {
    "lora": LoRAConfig(rank=2, alpha=3),
    "dora": LoRAConfig(rank=2, use_dora=True),
    "pissa": LoRAConfig(rank=2, init="pissa"),
}


def adapted(config: LoRAConfig) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(20, 3)).double().eval()
    attach(net, config)
    stir(net)
    return net


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_factor_of_one_changes_nothing_and_none_is_kept(config: LoRAConfig) -> None:
    net, x = adapted(config), torch.randn(7, 3, 6, dtype=torch.float64)
    expected = net(x)
    with scaled(net, 1):
        assert torch.equal(net(x), expected)
    with scaled(net, 0.5):
        assert not torch.allclose(net(x), expected)
    assert torch.equal(net(x), expected)


def test_a_bypass_is_scaled_like_a_layer() -> None:
    net = adapted(LoRAConfig(rank=2, target_modules=[], bypass=(18, 3)))
    x = torch.randn(7, 3, 6, dtype=torch.float64)
    with disabled(net):
        base = net(x)
    change = net(x) - base
    assert change.abs().max() > 0.1
    with scaled(net, 0.25):
        torch.testing.assert_close(net(x) - base, 0.25 * change)


@pytest.mark.parametrize("config", [LoRAConfig(rank=2, init="mica"), CONFIGS["dora"]], ids=["mica", "dora"])
def test_training_is_kept_where_the_base_is_written_within_a_factor_of_zero(config: LoRAConfig) -> None:
    net = adapted(config)
    trained = {key: value.clone() for key, value in adapter_state_dict(net).items()}
    with scaled(net, 0):
        with bare(net):
            pass
        net.load_state_dict(state(net))
    assert same(dict(adapter_state_dict(net)), trained)


def test_half_of_an_adapter_is_half_of_its_change_of_each_weight() -> None:
    net = adapted(CONFIGS["lora"])
    base, whole = (copy.deepcopy(net) for _ in range(2))
    with disabled(base):
        plain = {name: layer.weight.clone() for name, layer in base.named_modules() if hasattr(layer, "weight")}
    merge(whole)
    with scaled(net, 0.5):
        for name, weight in plain.items():
            change = whole.get_submodule(name).weight - weight
            torch.testing.assert_close(net.get_submodule(name).weight, weight + change / 2, rtol=0, atol=1e-12)
    with scaled(net, 0):
        assert all(torch.equal(net.get_submodule(name).weight, weight) for name, weight in plain.items())


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_for_good_is_what_it_was_for_a_while_in_a_folder_too(name: str, tmp_path: Path) -> None:
    net, x = adapted(CONFIGS[name]), torch.randn(7, 3, 6, dtype=torch.float64)
    with scaled(net, 0.3):
        expected = net(x)
    scale_adapter(net, 0.3)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-12)
    save_adapter(net, tmp_path / "adapter")
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(6, 5), nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(20, 3)).double().eval()
    load_adapter(other, tmp_path / "adapter")
    torch.testing.assert_close(other(x), expected, rtol=0, atol=1e-12)


def test_pissa_is_refused_for_good() -> None:
    with pytest.raises(ValueError, match="Adapters of PiSSA add the difference to their initial values"):
        scale_adapter(adapted(CONFIGS["pissa"]), 0.5)
