"""Adapter folders: written here and read by PEFT, written by PEFT and read here, and refused when they do not fit."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lightning import LoRAConfig, RichBoyNet, load_adapter, save_adapter
from lora_lightning.lora import adapter_state_dict, attach, base_fingerprint, detach, is_adapted
from lora_lightning.peft_format.folder import trained_on

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of PEFT's dependencies, while they are imported
    import peft


class Net(nn.Module):
    """Names that end alike, at two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.block.add_module("head", nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(x))


CONFIGS = {
    "plain": LoRAConfig(rank=2, alpha=3),
    "alpha follows rank patterns": LoRAConfig(rank=2, rank_pattern={"block.head": 4, r"block\.0": 1}),
    "alpha pattern": LoRAConfig(rank=2, alpha=3, alpha_pattern={"head": 5}),
    "use_rslora": LoRAConfig(rank=4, alpha=3, use_rslora=True),
    "one of two that end alike": LoRAConfig(rank=2, target_modules="head"),
}


def adapted(config: LoRAConfig, net: nn.Module | None = None) -> nn.Module:
    net = Net() if net is None else net
    attach(net, config)
    for key, value in adapter_state_dict(net).items():
        if key.endswith("lora_B"):
            nn.init.normal_(value)
    return net


def plain(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net)
    detach(net)
    return net


@pytest.mark.smoke
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_peft_reads_what_is_written_here(config: LoRAConfig, tmp_path: Path) -> None:
    net, x = adapted(config), torch.randn(5, 8)
    save_adapter(net, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(plain(net), tmp_path / "adapter")
    torch.testing.assert_close(theirs(x), net(x))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_written_is_read_back_bitwise(config: LoRAConfig, tmp_path: Path) -> None:
    net, x = adapted(config), torch.randn(5, 8)
    save_adapter(net, tmp_path / "adapter")
    other = plain(net)
    assert load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other(x), net(x))
    for key, value in adapter_state_dict(net).items():
        assert torch.equal(adapter_state_dict(other)[key], value)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "arguments",
    [
        {"target_modules": ["head"]},
        {"target_modules": ["block.head"], "use_rslora": True},
        {"target_modules": "all-linear", "rank_pattern": {"block.0": 3}, "alpha_pattern": {"head": 1}},
        {"target_modules": r"block\.0", "lora_dropout": 0.5},
    ],
)
def test_what_peft_writes_is_read_here(arguments: dict[str, Any], tmp_path: Path) -> None:
    net, x = Net(), torch.randn(5, 8)
    base = copy.deepcopy(net)
    theirs = peft.get_peft_model(net, peft.LoraConfig(r=2, lora_alpha=5, init_lora_weights=False, **arguments))
    theirs.eval().save_pretrained(tmp_path)
    load_adapter(base.eval(), tmp_path)
    torch.testing.assert_close(base(x), theirs(x))


def test_the_format_is_pefts_to_the_letter(tmp_path: Path) -> None:
    net = adapted(LoRAConfig(rank=1), RichBoyNet(4, 6))
    save_adapter(net, tmp_path)
    description = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {key: description[key] for key in ("peft_type", "r", "lora_alpha", "bias", "use_dora")} == {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "bias": "none",
        "use_dora": False,
    }
    assert description["target_modules"] == ["linear1", "linear2", "linear3"]
    shapes = {key: tuple(value.shape) for key, value in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert shapes["base_model.model.linear1.lora_A.weight"] == (1, 784)
    assert shapes["base_model.model.linear1.lora_B.weight"] == (4, 1)
    assert len(shapes) == 6


def test_a_bare_layer_is_saved_and_loaded(tmp_path: Path) -> None:
    layer = adapted(LoRAConfig(rank=1), nn.Linear(3, 2))
    save_adapter(layer, tmp_path / "adapter")
    other = plain(layer)
    assert load_adapter(other, tmp_path / "adapter") == [""]
    assert torch.equal(
        adapter_state_dict(other)["lora_weight.default.lora_B"], adapter_state_dict(layer)["lora_weight.default.lora_B"]
    )


def test_adapters_that_are_attached_take_the_numbers_of_the_folder(tmp_path: Path) -> None:
    net = adapted(LoRAConfig(rank=2, alpha=3))
    save_adapter(net, tmp_path)
    other = plain(net)
    attach(other, LoRAConfig(rank=2, alpha=3))
    load_adapter(other, tmp_path)
    x = torch.randn(5, 8)
    assert torch.equal(other(x), net(x))


def test_a_folder_says_which_base_it_was_trained_on(tmp_path: Path) -> None:
    net = adapted(LoRAConfig(rank=2))
    save_adapter(net, tmp_path / "here")
    assert trained_on(tmp_path / "here") == base_fingerprint(plain(net))
    peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["head"])).save_pretrained(tmp_path / "there")
    assert trained_on(tmp_path / "there") is None


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    net = adapted(LoRAConfig(rank=2))
    save_adapter(net, tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"exists: it is not overwritten. Choose another folder"):
        save_adapter(adapted(LoRAConfig(rank=1)), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def edit(folder: Path, **entries: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


class TestRefusals:
    """A folder that does not fit is refused by name, and the module stays as it was."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        save_adapter(adapted(LoRAConfig(rank=2, alpha=3)), tmp_path / "adapter")
        return tmp_path / "adapter"

    def refuse(
        self, folder: Path, message: str, kind: type[Exception] = ValueError, net: nn.Module | None = None
    ) -> None:
        net = Net() if net is None else net
        digest, was_adapted = base_fingerprint(net), is_adapted(net)
        with pytest.raises(kind, match=message):
            load_adapter(net, folder)
        assert base_fingerprint(net) == digest
        assert is_adapted(net) == was_adapted
        assert was_adapted or all(parameter.requires_grad for parameter in net.parameters())

    def test_a_folder_or_file_that_is_not_there(self, folder: Path, tmp_path: Path) -> None:
        self.refuse(tmp_path / "no", r"no.adapter_config\.json does not exist\. Expected a folder", FileNotFoundError)
        (folder / "adapter_model.safetensors").unlink()
        self.refuse(folder, "Expected the weights of the adapter next to its adapter_config.json", FileNotFoundError)

    def test_another_method(self, folder: Path) -> None:
        edit(folder, peft_type="LOHA")
        self.refuse(folder, "peft_type 'LOHA'; expected 'LORA'")

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"use_qalora": True}, "use_qalora .QALoRA."),
            ({"layer_replication": [[0, 2]]}, "layer_replication .replicated layers."),
            ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' .may have changed the base."),
        ],
    )
    def test_parts_that_are_not_supported(self, folder: Path, entry: dict[str, Any], message: str) -> None:
        edit(folder, **entry)
        self.refuse(folder, f"has settings that cannot be loaded: {message}")

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"r": 3}, r"does not fit this Net: .*lora_A is \(2, 8\), expected \(3, 8\)"),
            ({"r": "two"}, "rank='two': a LoRA rank"),
            ({"lora_alpha": None, "r": 0}, "rank=0: a LoRA rank"),
            ({"bias": "all"}, r"does not fit this Net: .*head.bias is missing, expected \(4,\)"),
            ({"bias": "some"}, "bias='some': expected one of none, all, lora_only"),
            ({"lora_bias": True}, r"head.lora_bias is missing, expected \(4,\)"),
        ],
    )
    def test_a_configuration_that_is_wrong(self, folder: Path, entry: dict[str, Any], message: str) -> None:
        edit(folder, **entry)
        self.refuse(folder, message)

    def test_a_configuration_without_rank(self, folder: Path) -> None:
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        self.refuse(folder, "does not have the entry 'r'; expected r and lora_alpha")

    @pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
    def test_a_configuration_that_is_damaged(self, folder: Path, content: str) -> None:
        (folder / "adapter_config.json").write_text(content)
        self.refuse(folder, "adapter_config.json (is not valid JSON|contains a list)")

    @pytest.mark.parametrize("size", [0, 7, 100, -1])
    def test_weights_that_are_truncated(self, folder: Path, size: int) -> None:
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:size])
        self.refuse(folder, "adapter_model.safetensors is damaged or not a safetensors file")

    def test_weights_of_another_kind(self, folder: Path) -> None:
        save_file({"weight": torch.zeros(2)}, folder / "adapter_model.safetensors")
        self.refuse(folder, "contains weight; expected only keys like 'base_model.model.<layer>.lora_A.weight'")

    def test_another_network(self, folder: Path) -> None:
        self.refuse(
            folder,
            "adapts 'block.0', which this RichBoyNet does not have. .*: linear1, linear2, linear3",
            net=RichBoyNet(2, 2),
        )
        wide = Net()
        wide.head = nn.Linear(16, 4)
        self.refuse(folder, r"head.lora_A is \(2, 8\), expected \(2, 16\)", net=wide)

    def test_half_an_adapter(self, folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        del tensors["base_model.model.head.lora_B.weight"]
        save_file(tensors, path)
        self.refuse(folder, "head.lora_B is missing")

    def test_other_adapters_than_those_attached(self, folder: Path) -> None:
        net = Net()
        attach(net, LoRAConfig(rank=2, alpha=8))
        self.refuse(folder, "differs from the attached one .*1.5.* in the folder, .*4.0.* attached", net=net)
