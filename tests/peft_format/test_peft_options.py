"""Folders that PEFT wrote with options of which only the tensors matter, and those of its older versions."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from lora_lightning import LoRAConfig, load_adapter, save_adapter
from lora_lightning.lora import (
    adapted_weights,
    adapter_parameters,
    attach,
    base_fingerprint,
    is_adapted,
    is_untrained,
    lora_plus_param_groups,
    merge,
    verify_adapters,
)
from lora_lightning.peft_format.folder import trained_on
from tests.helpers import stir


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8)}) for _ in range(4))
        self.words = nn.Embedding(7, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for layer in self.layers:
            x = layer["v"](layer["q"](x).relu())
        return x


@pytest.fixture
def net() -> Net:
    return Net().eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(7, (3, 5))


def of_peft(net: nn.Module, folder: Path, safe: bool = True, **options: object) -> nn.Module:
    """Return the network with adapters of PEFT, which are not zero, and write their folder."""
    other = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(r=2, **options)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for value in other.parameters():
            if value.requires_grad:
                value += 0.3 * torch.randn_like(value)
    other.save_pretrained(str(folder), safe_serialization=safe)
    return other


@pytest.mark.parametrize(
    ("options", "adapted"),
    [
        (
            {"target_modules": ["q"], "layers_to_transform": [1, 3], "layers_pattern": "layers"},
            ["layers.1.q", "layers.3.q"],
        ),
        ({"target_modules": ["v"], "layers_to_transform": 2, "layers_pattern": "layers"}, ["layers.2.v"]),
        ({"target_modules": ["v"], "layers_to_transform": [0], "layers_pattern": ["layers"]}, ["layers.0.v"]),
        ({"target_modules": "all-linear", "exclude_modules": r".*\.[123]\..*|.*q"}, ["layers.0.v"]),
        (
            {"target_modules": ["q", "v"], "exclude_modules": ["q", "layers.0.v", "layers.1.v"]},
            ["layers.2.v", "layers.3.v"],
        ),
        (
            {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "layers", "rank_pattern": {"q": 3}},
            ["layers.1.q"],
        ),
    ],
)
def test_the_layers_are_those_that_peft_chose(
    net: Net, ids: Tensor, options: dict[str, object], adapted: list[str], tmp_path: Path
) -> None:
    other, base = of_peft(net, tmp_path, **options), copy.deepcopy(net)
    assert load_adapter(net, tmp_path) == adapted
    torch.testing.assert_close(net(ids), other(ids))
    save_adapter(net, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(base, str(tmp_path / "again"))
    torch.testing.assert_close(again(ids), net(ids))


class TestMiCA:
    """B holds minor singular vectors of W and stays as it is; A is trained."""

    def test_a_folder_of_peft_goes_on_with_a_fixed_b(self, net: Net, ids: Tensor, tmp_path: Path) -> None:
        digest = base_fingerprint(net)
        other = of_peft(net, tmp_path, target_modules=["q", "words"], init_lora_weights="mica")
        load_adapter(net, tmp_path)
        torch.testing.assert_close(net(ids), other(ids))
        assert base_fingerprint(net) == digest
        assert {key.rpartition(".")[2] for key, value in net.named_parameters() if value.requires_grad} == {"lora_A"}
        assert {id(value) for value in adapter_parameters(net)} == {
            id(each.factors[0]) for each in adapted_weights(net)
        }
        before = [each.factors[1].clone() for each in adapted_weights(net)]
        rest, ups = lora_plus_param_groups(net, 0.1, 16)
        assert len(rest["params"]) == 5
        assert ups["params"] == []
        assert (rest["lr"], ups["lr"]) == (0.1, 1.6)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        net(ids).square().sum().backward()
        optimizer.step()
        assert all(torch.equal(each.factors[1], b) for each, b in zip(adapted_weights(net), before, strict=True))

    def test_it_starts_as_pefts_does_and_its_folder_is_loaded_there(
        self, net: Net, ids: Tensor, tmp_path: Path
    ) -> None:
        base, y = copy.deepcopy(net), net(ids)
        theirs = peft.get_peft_model(
            copy.deepcopy(net), peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights="mica")
        )
        attach(net, LoRAConfig(rank=2, target_modules=["q"], init="mica"))
        assert torch.equal(net(ids), y)
        assert is_untrained(net)
        for each in adapted_weights(net):
            b = theirs.get_submodule(f"base_model.model.{each.layer_name}").lora_B["default"].weight
            torch.testing.assert_close(each.factors[1].abs(), b.abs(), rtol=1e-4, atol=1e-5)
        verify_adapters(net, ids)
        stir(net, 0.3)
        save_adapter(net, tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] == "mica"
        other = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), is_trainable=True)
        torch.testing.assert_close(other(ids), net(ids))
        assert not any("lora_B" in key for key, value in other.named_parameters() if value.requires_grad)
        y = net(ids)
        merge(net)
        torch.testing.assert_close(net(ids), y)

    @pytest.mark.parametrize("option", [{"use_dora": True}, {"lora_bias": True}, {"qkv": "qv"}])
    def test_what_it_cannot_be_combined_with_is_named(self, option: dict[str, object]) -> None:
        with pytest.raises(ValueError, match=f"init='mica' cannot be combined with {next(iter(option))}"):
            LoRAConfig(init="mica", **option)  # type: ignore[arg-type]


class TestFoldersOfOlderVersions:
    def test_a_bin_file_is_read(self, net: Net, ids: Tensor, tmp_path: Path) -> None:
        other = of_peft(net, tmp_path, safe=False, target_modules=["q", "v"], use_dora=True)
        assert (tmp_path / "adapter_model.bin").exists()
        assert not (tmp_path / "adapter_model.safetensors").exists()
        assert trained_on(tmp_path) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_adapter(net, tmp_path)
        torch.testing.assert_close(net(ids), other(ids))

    def test_reading_it_runs_no_code(self, net: Net, tmp_path: Path) -> None:
        class Attack:
            def __reduce__(self) -> tuple[object, ...]:
                return Path.touch, (tmp_path / "ran",)

        of_peft(net, tmp_path, safe=False, target_modules=["q"])
        torch.save({"base_model.model.layers.0.q.lora_A.weight": Attack()}, tmp_path / "adapter_model.bin")
        with pytest.raises(ValueError, match=r"adapter_model.bin refers to \S+, which is not read with weights_only"):
            load_adapter(net, tmp_path)
        assert not (tmp_path / "ran").exists()
        assert not is_adapted(net)

    @pytest.mark.parametrize("content", [b"", b"PK", pickle.dumps({"a": 1})])
    def test_a_damaged_one_is_refused(self, net: Net, content: bytes, tmp_path: Path) -> None:
        of_peft(net, tmp_path, safe=False, target_modules=["q"])
        (tmp_path / "adapter_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"adapter_model.bin is damaged or not a checkpoint"):
            load_adapter(net, tmp_path)
        torch.save({"a": 1}, tmp_path / "adapter_model.bin")
        with pytest.raises(ValueError, match=r"adapter_model.bin holds something other than tensors by name"):
            load_adapter(net, tmp_path)
        assert not is_adapted(net)

    def test_the_newer_file_goes_first(self, net: Net, ids: Tensor, tmp_path: Path) -> None:
        of_peft(net, tmp_path, safe=False, target_modules=["q"])
        other = of_peft(net, tmp_path, target_modules=["q"])
        load_adapter(net, tmp_path)
        torch.testing.assert_close(net(ids), other(ids))
