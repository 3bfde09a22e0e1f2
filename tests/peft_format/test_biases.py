"""Biases in adapter folders: those that PEFT writes are loaded here, and those written here are loaded by PEFT."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_lightning import LoRAConfig, load_adapter, save_adapter
from lora_lightning.lora import adapter_state_dict, attach, base_fingerprint, detach, set_adapter
from tests.helpers import stir


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.LayerNorm(16)
        self.inner = nn.Linear(16, 6)
        self.transposed = Conv1D(5, 6)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.transposed(self.inner(self.norm(self.conv(x).flatten(1))).relu()))


@pytest.fixture
def net() -> Net:
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, 4, 4)


OPTIONS = [
    {"bias": "all"},
    {"bias": "lora_only"},
    {"lora_bias": True},
    {"bias": "all", "lora_bias": True},
    {"bias": "lora_only", "use_dora": True},
    {"bias": "all", "modules_to_save": ["head"]},
]
TARGETS = ["conv", "inner", "transposed"]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT says this of a Linear beside a Conv1D
@pytest.mark.filterwarnings("ignore:.*have invalid shape")  # and of each bias of B, when it saves
@pytest.mark.parametrize("options", OPTIONS)
def test_a_folder_of_peft_gives_the_same_outputs(
    net: Net, x: Tensor, options: dict[str, object], tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, **options)  # type: ignore[arg-type]
    base, before = copy.deepcopy(net), base_fingerprint(net)
    other = peft.get_peft_model(copy.deepcopy(net), config).eval()
    with torch.no_grad():
        for value in other.parameters():
            if value.requires_grad:
                value += 0.3 * torch.randn_like(value)
    other.save_pretrained(str(tmp_path))
    load_adapter(net, tmp_path)
    torch.testing.assert_close(net(x), other(x))
    save_adapter(net, tmp_path / "again")
    load_adapter(base, tmp_path / "again")
    assert torch.equal(base(x), net(x))
    detach(net)
    assert base_fingerprint(net) == before


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT says this of a Linear beside a Conv1D
@pytest.mark.parametrize("options", OPTIONS)
def test_a_folder_for_peft_gives_the_same_outputs(
    net: Net, x: Tensor, options: dict[str, object], tmp_path: Path
) -> None:
    base = copy.deepcopy(net)
    attach(net, LoRAConfig(rank=2, alpha=3, target_modules=TARGETS, **options))  # type: ignore[arg-type]
    stir(net, 0.3)
    save_adapter(net, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        other = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
        load_adapter(base, tmp_path, strict=True)
    torch.testing.assert_close(other(x), net(x))
    assert torch.equal(base(x), net(x))
    description = json.loads((tmp_path / "adapter_config.json").read_text())
    assert description["bias"] == options.get("bias", "none")
    assert description["lora_bias"] == options.get("lora_bias", False)


def test_each_of_several_active_ones_has_a_folder_with_its_own_values(net: Net, x: Tensor, tmp_path: Path) -> None:
    """Each folder names the base itself, whatever other adapters train of it."""
    base = copy.deepcopy(net)
    attach(net, LoRAConfig(rank=1, target_modules=["inner"], modules_to_save=["head"]), "a")
    stir(net, 0.3)
    attach(net, LoRAConfig(rank=1, target_modules=["conv"], bias="lora_only", lora_bias=True), "b")
    stir(net, 0.3)
    attach(net, LoRAConfig(rank=1, target_modules=["conv"], bias="all"), "c")
    stir(net, 0.3)
    set_adapter(net, ["a", "b"], trained="b")
    state, y = {key: value.clone() for key, value in adapter_state_dict(net).items()}, net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("a", "b", "c"):
            save_adapter(net, tmp_path / name, name)
            load_adapter(base, tmp_path / name, name, strict=True)
    assert torch.equal(net(x), y)
    assert all(torch.equal(value, state[key]) for key, value in adapter_state_dict(net).items())
    set_adapter(base, ["a", "b"], trained="b")
    assert torch.equal(base(x), y)
    set_adapter(net, "c")
    set_adapter(base, "c")
    assert torch.equal(base(x), net(x))
