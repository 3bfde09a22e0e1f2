"""Adapter folders of every kind of layer, exchanged with PEFT where it is right, and kept from it where it is wrong."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lora_lightning import LoRAConfig, load_adapter, save_adapter
from lora_lightning.lora import adapter_state_dict, attach, base_fingerprint, detach, merged
from tests.helpers import stir

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of PEFT's dependencies, while they are imported
    import peft


class Text(nn.Module):
    """An embedding classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.head = nn.Linear(8, 3)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.embed(index).mean(1))


class Signal(nn.Module):
    """Convolutions of one and three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(2, 4, 3, stride=2, padding=1)
        self.three = nn.Conv3d(4, 3, (1, 1, 2), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.one(x)[:, :, None, None, :]).mean((2, 3, 4))


class Generator(nn.Module):
    """A block with the transposed linear layer of the transformers library, and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.c_attn = Conv1D(6, 4)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c_attn(x).relu())


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=5)


# Where PEFT is right in a ViT: not in its attention, whose projections are read.
VIT = ["conv_proj", "mlp.0", "mlp.3", "heads.head"]
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Any]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), lambda: torch.randn(5, 8), "all"),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5), lambda: torch.randn(2, 3, 32, 32), "all"),
    "vit": (vit, lambda: torch.randn(2, 3, 8, 8), VIT),
    "embedding": (Text, lambda: torch.randint(11, (5, 4)), "all"),
    "conv1d and conv3d": (Signal, lambda: torch.randn(2, 2, 9), "all"),
    "transposed": (Generator, lambda: torch.randn(2, 3, 4), "all"),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"alpha": 3},
    "use_rslora": {"use_rslora": True},
    "use_dora": {"use_dora": True, "alpha": 5},
    "pissa": {"init": "pissa"},
    "pissa rslora": {"init": "pissa", "use_rslora": True, "alpha": 3},
}
PEFT_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"lora_alpha": 3},
    "use_rslora": {"use_rslora": True},
    "use_dora": {"use_dora": True},
}


def build(case: str) -> tuple[nn.Module, Tensor, Any]:
    make, inputs, targets = CASES[case]
    net = make().eval()
    for layer in net.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():  # a ViT's head begins at zero
            nn.init.normal_(layer.weight, std=0.1)
    return net, inputs(), targets


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")  # PEFT corrects it layer by layer
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_peft_gives_the_same_logits(case: str, variant: str, tmp_path: Path) -> None:
    net, x, targets = build(case)
    base = copy.deepcopy(net)
    attach(net, LoRAConfig(rank=2, target_modules=targets, **VARIANTS[variant]))
    stir(net)
    save_adapter(net, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(x), net(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net(x), base(x), atol=1e-3)
    load_adapter(base, tmp_path / "adapter")
    torch.testing.assert_close(base(x), net(x), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("variant", PEFT_VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_folders_of_peft_give_the_same_logits(case: str, variant: str, tmp_path: Path) -> None:
    net, x, targets = build(case)
    if targets == "all":
        kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        targets = [n for n, m in net.named_modules() if isinstance(m, kinds) or type(m).__name__ == "Conv1D"]
    base, before = copy.deepcopy(net), net(x)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **PEFT_VARIANTS[variant])
    theirs = peft.get_peft_model(net, config).eval()
    theirs.save_pretrained(tmp_path)
    digest = base_fingerprint(base)
    load_adapter(base, tmp_path)
    torch.testing.assert_close(base(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base(x), before, atol=1e-3)
    assert base_fingerprint(base) == digest


def test_the_difference_of_pissa_is_exact_and_leaves_the_base_alone(tmp_path: Path) -> None:
    net, x, _ = build("mlp")
    digest = base_fingerprint(net)
    attach(net, LoRAConfig(rank=2, init="pissa"))
    stir(net)
    save_adapter(net, tmp_path)
    assert base_fingerprint(net) == digest
    description = json.loads((tmp_path / "adapter_config.json").read_text())
    assert description["r"] == 4
    assert description["init_lora_weights"] is True
    y = net(x)
    detach(net)
    load_adapter(net, tmp_path)
    torch.testing.assert_close(net(x), y)


def test_modules_trained_whole_go_along_both_ways(tmp_path: Path) -> None:
    net, x, _ = build("resnet18")
    base = copy.deepcopy(net)
    attach(net, LoRAConfig(rank=2, target_modules=["conv1", "conv2"], modules_to_save=["fc", "layer4.1.bn2"]))
    stir(net)
    net.train()(x)  # the norm layer that trains keeps its own statistics
    net.eval()
    save_adapter(net, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(x), net(x), rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(base, tmp_path / "theirs")
    assert torch.equal(base(x), net(x))
    assert torch.equal(base.fc.weight, net.fc.weight)
    assert torch.equal(base.layer4[1].bn2.running_mean, net.layer4[1].bn2.running_mean)


class Odd(nn.Module):
    """Layers that PEFT does not know, or gets wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.dilated = nn.Conv2d(2, 4, 3, dilation=2, padding=2)
        self.reflected = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.matrix = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.reflected(self.dilated(x))).flatten(2).mT
        return self.lstm(self.attention(x, x, x)[0] @ self.matrix)[0]


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=2, target_parameters=["matrix"]),
        LoRAConfig(rank=2, target_parameters=["matrix"], init="pissa"),
        LoRAConfig(rank=2, target_parameters=["matrix"], use_dora=True, rank_pattern={"lstm": 1}, alpha=3),
        LoRAConfig(rank=2, target_modules=["lstm"], bypass=(50, 100)),
        LoRAConfig(rank=2, target_modules=["dilated"]),
        LoRAConfig(rank=2, target_modules=["reflected"]),
        LoRAConfig(rank=2, target_modules=["grouped"]),
        LoRAConfig(rank=2, target_modules=["attention.out_proj"]),
    ],
)
def test_what_peft_gets_wrong_is_kept_from_it_and_read_back_here(config: LoRAConfig, tmp_path: Path) -> None:
    net, x = Odd().eval(), torch.randn(3, 2, 5, 5)
    base = copy.deepcopy(net)
    names = attach(net, config)
    stir(net)
    save_adapter(net, tmp_path)
    with pytest.raises((KeyError, ValueError), match="LORA_LIGHTNING"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    digest = base_fingerprint(base)
    assert load_adapter(base, tmp_path) == names
    assert base_fingerprint(base) == digest
    torch.testing.assert_close(base(x), net(x))


def test_a_dilated_convolution_of_peft_loads_with_a_warning_and_the_dense_layer_decides(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Conv2d(2, 4, 3, padding=2, dilation=2)), torch.randn(2, 2, 7, 7)
    base = copy.deepcopy(net)
    theirs = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="differ for the adapters of 0: PEFT ignores the dilation"):
        load_adapter(base, tmp_path)
    y = base(x)
    with merged(base):
        torch.testing.assert_close(base(x), y)


def test_an_attention_of_peft_loads_with_a_warning(tmp_path: Path) -> None:
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    base = copy.deepcopy(net)
    theirs = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["attention"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="applies the output projection of an attention twice"):
        names = load_adapter(base, tmp_path)
    assert sorted(names) == ["attention.in_proj_weight", "attention.out_proj"]
    parts = theirs.base_model.model["attention"]
    state = adapter_state_dict(base)
    assert torch.equal(state["attention.lora_in_proj_weight.default.lora_A"], parts.lora_A["default"].weight)
    assert torch.equal(
        state["attention.out_proj.lora_weight.default.lora_B"], parts.base_layer.out_proj.lora_B["default"].weight
    )


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_a_grouped_convolution_of_peft_is_refused_as_it_is_no_grouped_convolution(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    base = copy.deepcopy(net)
    peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"0\.lora_A is \(2, 4, 3, 3\), expected \(2, 2, 3, 3\); .*mixes the groups"):
        load_adapter(base, tmp_path)
    assert type(base[0]) is nn.Conv2d
    assert base[0].weight.requires_grad


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.LoHaConfig(target_modules=["0"]), "LOHA"),
        (peft.IA3Config(target_modules=["0"], feedforward_modules=[]), "IA3"),
    ],
)
def test_another_method_of_peft_is_refused(config: Any, kind: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    peft.get_peft_model(copy.deepcopy(net), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"is of peft_type '{kind}'; expected 'LORA'"):
        load_adapter(net, tmp_path)
    assert type(net[0]) is nn.Linear


def test_pefts_own_pissa_folder_is_refused_as_it_changed_its_base(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    base, x = copy.deepcopy(net), torch.randn(3, 8)
    theirs = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))
    theirs.save_pretrained(tmp_path / "raw")
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa' \(may have changed the base\)"):
        load_adapter(base, tmp_path / "raw")
    ours = copy.deepcopy(base)
    attach(ours, LoRAConfig(rank=2, alpha=8, target_modules=["0"], init="pissa"))
    torch.testing.assert_close(ours(x), base(x))
    factors = (
        ours[0].lora_weight.default.lora_B @ ours[0].lora_weight.default.lora_A,
        theirs.base_model.model[0].lora_B["default"].weight @ (theirs.base_model.model[0].lora_A["default"].weight),
    )
    torch.testing.assert_close(*factors)
