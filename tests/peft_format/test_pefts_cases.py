"""The configurations of LoRA that PEFT's own tests use, in both directions: outputs, merged, disabled, and the files.

`OF_PEFT` are those of the table in PEFT 0.21's `tests/test_custom_models.py`, and `OTHERS` are settings of its
other tests.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_lightning import LoRAConfig, load_adapter, save_adapter
from lora_lightning.lora import attach, base_fingerprint, detach, disabled, is_adapted, merge
from tests.helpers import stir

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*have invalid shape"),  # PEFT says this of each bias of B when it saves
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]
Options = dict[str, Any]


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.relu, self.norm = nn.Linear(10, 20), nn.ReLU(), nn.LayerNorm(20)
        self.lin1 = nn.Linear(20, 2)


class Words(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv1d, self.flat, self.lin0 = nn.Embedding(100, 5), Conv1D(1, 5), nn.Flatten(), nn.Linear(10, 2)


class Signals(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.conv1d, self.flat = nn.Unflatten(1, (1, 10)), nn.Conv1d(1, 1, 2), nn.Flatten()
        self.lin0 = nn.Linear(9, 2)


class Images(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.conv2d, self.flat, self.lin0 = nn.Conv2d(5, 10, 3), nn.Flatten(), nn.Linear(10, 2)


class Grouped(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.conv2d, self.flat = nn.Conv2d(16, 16, 3, groups=8), nn.Flatten()


class GroupedByTwo(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.conv2d, self.flat = nn.Conv2d(16, 32, 3, padding=1, groups=2), nn.Flatten()


class Volumes(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.conv3d, self.flat, self.lin0 = nn.Conv3d(5, 10, 3), nn.Flatten(), nn.Linear(10, 2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha, self.lin0 = nn.MultiheadAttention(10, 2), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.mha(x, x, x)[0])


class Product(nn.Module):
    """A linear layer of its own, whose parameter is named."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(rows, columns)), nn.Parameter(torch.ones(columns))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Products(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.relu, self.lin1 = Product(10, 20), nn.ReLU(), Product(20, 2)


class Tables(nn.Module):
    """Two parameters of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 10)), nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.first.T).relu() @ self.second.T


class TwoTables(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.both = Tables()


class Reading(nn.Module):
    """One parameter of a module that is called, and one of a module that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.holder = Product(4, 4), nn.Module()
        self.holder.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x) @ self.holder.weight


class Block(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.relu, self.lin1 = nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.out = nn.ModuleList(Block() for _ in range(4)), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


INPUTS: dict[type[nn.Module], Callable[[], Tensor]] = {
    Mlp: lambda: torch.randn(9, 10),
    Words: lambda: torch.randint(100, (9, 10)),
    Signals: lambda: torch.randn(9, 10),
    Images: lambda: torch.randn(9, 5, 3, 3),
    Grouped: lambda: torch.randn(2, 16, 3, 3),
    GroupedByTwo: lambda: torch.randn(2, 16, 5, 5),
    Volumes: lambda: torch.randn(9, 5, 3, 3, 3),
    Attention: lambda: torch.randn(9, 10),
    Products: lambda: torch.randn(9, 10),
    TwoTables: lambda: torch.randn(9, 10),
    Deep: lambda: torch.randn(9, 10),
}

COPIES = ("emb.base_layer.weight", "modules_to_save.bias", "original_module.bias")
"""Tensors that PEFT adds: those of the base, and those that it writes twice."""

OF_PEFT: dict[str, tuple[type[nn.Module], Options]] = {
    "MLP 1": (Mlp, {"target_modules": "lin0"}),
    "MLP 2": (Mlp, {"target_modules": ["lin0"]}),
    "MLP 3": (Mlp, {"target_modules": ["lin1"]}),
    "MLP 4": (Mlp, {"target_modules": ["lin0", "lin1"]}),
    "MLP 5": (Mlp, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "MLP 6": (Mlp, {"target_modules": ["lin0"], "lora_alpha": 4, "lora_dropout": 0.1}),
    "MLP 7, DoRA": (Mlp, {"target_modules": ["lin0"], "use_dora": True}),
    "MLP 8, DoRA": (Mlp, {"target_modules": ["lin0", "lin1"], "use_dora": True}),
    "MLP 9, DoRA": (Mlp, {"target_modules": "lin1", "use_dora": True, "lora_alpha": 32}),
    "MLP, MiCA": (Mlp, {"target_modules": ["lin0"], "init_lora_weights": "mica", "r": 4}),
    "words 1": (Words, {"target_modules": ["conv1d"]}),
    "words 2": (Words, {"target_modules": ["emb"]}),
    "words 3": (Words, {"target_modules": ["emb", "conv1d"]}),
    "words 1, DoRA": (Words, {"target_modules": ["conv1d"], "use_dora": True}),
    "words 2, DoRA": (Words, {"target_modules": ["emb"], "use_dora": True}),
    "words 3, DoRA": (Words, {"target_modules": ["emb", "conv1d"], "use_dora": True}),
    "Conv1d": (Signals, {"target_modules": ["conv1d"]}),
    "Conv1d, DoRA": (Signals, {"target_modules": ["conv1d"], "use_dora": True}),
    "Conv2d 1": (Images, {"target_modules": ["conv2d"]}),
    "Conv2d 2": (Images, {"target_modules": ["conv2d", "lin0"]}),
    "Conv2d 1, DoRA": (Images, {"target_modules": ["conv2d"], "use_dora": True}),
    "Conv2d 2, DoRA": (Images, {"target_modules": ["conv2d", "lin0"], "use_dora": True}),
    "Conv3d 1": (Volumes, {"target_modules": ["conv3d"]}),
    "Conv3d 2": (Volumes, {"target_modules": ["conv3d", "lin0"]}),
    "Conv3d 1, DoRA": (Volumes, {"target_modules": ["conv3d"], "use_dora": True}),
    "Conv3d 2, DoRA": (Volumes, {"target_modules": ["conv3d", "lin0"], "use_dora": True}),
    "MLP, lora_bias": (Mlp, {"target_modules": ["lin0", "lin1"], "lora_bias": True, "lora_alpha": 32}),
    "Conv2d, lora_bias": (Images, {"target_modules": ["conv2d"], "lora_bias": True, "lora_alpha": 32}),
    "Conv3d, lora_bias": (Volumes, {"target_modules": ["conv3d"], "lora_bias": True, "lora_alpha": 32}),
}
OTHERS: dict[str, tuple[type[nn.Module], Options]] = {
    "all linear": (Mlp, {"target_modules": "all-linear"}),
    "MLP, bias all": (Mlp, {"target_modules": ["lin0"], "bias": "all"}),
    "MLP, bias lora_only": (Mlp, {"target_modules": ["lin0"], "bias": "lora_only"}),
    "MLP, both biases": (Mlp, {"target_modules": ["lin0"], "bias": "lora_only", "lora_bias": True}),
    "MLP, bias all and a module": (Mlp, {"target_modules": ["lin0"], "bias": "all", "modules_to_save": ["lin1"]}),
    "MLP, DoRA and bias all": (Mlp, {"target_modules": ["lin0"], "bias": "all", "use_dora": True}),
    "words, bias all": (Words, {"target_modules": ["conv1d"], "bias": "all"}),
    "words, bias lora_only": (Words, {"target_modules": ["emb", "conv1d", "lin0"], "bias": "lora_only"}),
    "Conv1d, bias lora_only": (Signals, {"target_modules": ["conv1d"], "bias": "lora_only"}),
    "Conv2d, bias all": (Images, {"target_modules": ["conv2d", "lin0"], "bias": "all"}),
    "Conv3d, bias all": (Volumes, {"target_modules": ["conv3d"], "bias": "all"}),
    "Conv1d, lora_bias": (Signals, {"target_modules": ["conv1d", "lin0"], "lora_bias": True}),
    "Conv1D, lora_bias": (Words, {"target_modules": ["conv1d"], "lora_bias": True}),
    "rsLoRA": (Mlp, {"target_modules": ["lin0"], "use_rslora": True, "r": 4}),
    "rank_pattern": (Deep, {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 2, r"layers\.0\.lin0": 3}}),
    "alpha_pattern": (Deep, {"target_modules": ["lin0", "lin1"], "alpha_pattern": {r"layers\.1.*": 1, "lin1": 5}}),
    "a norm": (Mlp, {"target_modules": ["lin0"], "modules_to_save": ["norm", "lin1"]}),
    "an embedding": (Words, {"target_modules": ["lin0"], "modules_to_save": ["emb"]}),
    "excluded": (Mlp, {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin0"]}),
    "some layers": (Deep, {"target_modules": ["lin0"], "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    "gaussian": (Mlp, {"target_modules": ["lin0"], "init_lora_weights": "gaussian"}),
    "orthogonal": (Mlp, {"target_modules": ["lin0"], "init_lora_weights": "orthogonal"}),
    "random": (Mlp, {"target_modules": ["lin0"], "init_lora_weights": False}),
}
BOTH = OF_PEFT | OTHERS

REFUSED: dict[str, tuple[type[nn.Module], Options, str]] = {
    "KaSA": (Mlp, {"target_modules": ["lin0"], "kasa_config": peft.KasaConfig(), "r": 4}, r"kasa_config \(KaSA\)"),
    **{
        f"VeLoRA, {how}": (
            Mlp,
            {"target_modules": ["lin0"], "velora_config": peft.VeloraConfig(num_groups=2, init_type=how)},
            r"velora_config \(VeLoRA\)",
        )
        for how in ("random", "batch_average", "batch_average_once")
    },
    "trainable tokens": (
        Words,
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}},
        r"trainable_token_indices \(trainable tokens\)",
    ),
    "Conv2d groups": (Grouped, {"target_modules": ["conv2d"]}, "grouped convolution mixes the groups"),
    "Conv2d two groups": (GroupedByTwo, {"target_modules": ["conv2d"]}, "grouped convolution mixes the groups"),
    "Conv2d groups, DoRA": (
        Grouped,
        {"target_modules": ["conv2d"], "use_dora": True},
        "grouped convolution mixes the groups",
    ),
    "Conv2d two groups, DoRA": (
        GroupedByTwo,
        {"target_modules": ["conv2d"], "use_dora": True},
        "grouped convolution mixes the groups",
    ),
    "MonteCLoRA": (
        Mlp,
        {"target_modules": ["lin0"], "monteclora_config": peft.MontecloraConfig(num_samples=2)},
        r"monteclora_config \(MonteCLoRA\)",
    ),
    "BD-LoRA of A": (
        Mlp,
        {
            "target_modules": ["lin0", "lin1"],
            "use_bdlora": BdLoraConfig(target_modules_bd_a=["lin0"], match_strict=False),
        },
        r"use_bdlora \(BD-LoRA\)",
    ),
    "BD-LoRA of B": (
        Mlp,
        {
            "target_modules": ["lin0", "lin1"],
            "use_bdlora": BdLoraConfig(target_modules_bd_b=["lin1"], nblocks=2, match_strict=False),
        },
        r"use_bdlora \(BD-LoRA\)",
    ),
    "BD-LoRA of both": (
        Mlp,
        {
            "target_modules": ["lin0", "lin1"],
            "use_bdlora": BdLoraConfig(target_modules_bd_a=["lin0"], target_modules_bd_b=["lin1"], nblocks=2),
        },
        r"use_bdlora \(BD-LoRA\)",
    ),
    "PiSSA": (Mlp, {"target_modules": ["lin0"], "init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "OLoRA": (Mlp, {"target_modules": ["lin0"], "init_lora_weights": "olora"}, "init_lora_weights='olora'"),
}


def ours(options: Options) -> LoRAConfig:
    """Return our configuration for the options of PEFT."""
    init = options.get("init_lora_weights")
    targets = options["target_modules"]
    layers = options.get("layers_to_transform")
    return LoRAConfig(
        rank=options.get("r", 8),
        alpha=options.get("lora_alpha", 8),
        dropout=options.get("lora_dropout", 0.0),
        target_modules=[f"layers.{layer}.{name}" for layer in layers for name in targets]
        if layers
        else [name for name in ("lin0", "lin1") if targets == "all-linear"] or targets,
        exclude_modules=options.get("exclude_modules", []),
        modules_to_save=options.get("modules_to_save", []),
        rank_pattern=options.get("rank_pattern", {}),
        alpha_pattern=options.get("alpha_pattern", {}),
        init=init if init in ("mica", "gaussian") else "kaiming",
        use_rslora=options.get("use_rslora", False),
        use_dora=options.get("use_dora", False),
        bias=options.get("bias", "none"),
        lora_bias=options.get("lora_bias", False),
    )


def of_peft(net: nn.Module, options: Options) -> nn.Module:
    """Return the network with adapters of PEFT that do something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = peft.get_peft_model(net, peft.LoraConfig(**copy.deepcopy(options))).eval()
    with torch.no_grad():
        for value in found.parameters():
            if value.requires_grad:
                value += 0.1 * torch.randn_like(value)
    return found


@pytest.mark.parametrize(("make", "options"), BOTH.values(), ids=BOTH)
def test_a_folder_of_peft_computes_the_same_here(make: type[nn.Module], options: Options, tmp_path: Path) -> None:
    net, x = make().eval(), INPUTS[make]()
    before, base = net(x), base_fingerprint(net)
    theirs = of_peft(copy.deepcopy(net), options)
    expected = theirs(x)
    theirs.save_pretrained(str(tmp_path))
    load_adapter(net, tmp_path)
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(net(x), expected)
    with disabled(net):
        torch.testing.assert_close(net(x), before)
    other = copy.deepcopy(net)
    merge(other)
    torch.testing.assert_close(other(x), expected)
    torch.testing.assert_close(theirs.merge_and_unload()(x), other(x))
    save_adapter(net, tmp_path / "again")
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    kept = first.keys() - {key for key in first if key.endswith(COPIES)}
    assert second.keys() == kept
    for key in kept:
        assert torch.equal(first[key], second[key]), key
    detach(net)
    assert torch.equal(net(x), before)
    assert base_fingerprint(net) == base


@pytest.mark.parametrize(("make", "options"), BOTH.values(), ids=BOTH)
def test_a_folder_of_ours_computes_the_same_in_peft(make: type[nn.Module], options: Options, tmp_path: Path) -> None:
    net, x = make().eval(), INPUTS[make]()
    plain = copy.deepcopy(net)
    attach(net, ours(options))
    net.eval()
    stir(net)
    save_adapter(net, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of keys that PEFT also looks for
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    torch.testing.assert_close(theirs(x), net(x))
    torch.testing.assert_close(theirs.merge_and_unload()(x), net(x))
    same = ("r", "lora_alpha", "lora_dropout", "bias", "lora_bias", "use_dora", "use_rslora", "modules_to_save")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = peft.LoraConfig(**copy.deepcopy(options))
    assert {key: written[key] for key in same} == {key: getattr(expected, key) for key in same}


@pytest.mark.parametrize(("make", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_refused_by_name(
    make: type[nn.Module], options: Options, message: str, tmp_path: Path
) -> None:
    net, x = make().eval(), INPUTS[make]()
    theirs = of_peft(copy.deepcopy(net), options)
    before = net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        load_adapter(net, tmp_path)
    assert not is_adapted(net)
    assert torch.equal(net(x), before)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("alora_invocation_tokens", [2, 3], "activated LoRA"),
        ("use_qalora", True, "QALoRA"),
        ("arrow_config", vars(ArrowConfig()), "Arrow"),
        ("layer_replication", [[0, 1], [0, 1]], "replicated layers"),
        ("megatron_config", {"a": 1}, "Megatron layers"),
        *[("init_lora_weights", init, f"init_lora_weights='{init}'") for init in ("corda", "loftq", "lora_ga")],
    ],
)
def test_settings_that_need_other_models_are_refused_as_well(
    setting: str, value: object, message: str, tmp_path: Path
) -> None:
    net = Mlp()
    of_peft(copy.deepcopy(net), {"target_modules": ["lin0"]}).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
    with pytest.raises(ValueError, match=message):
        load_adapter(net, tmp_path)
    assert not is_adapted(net)


@pytest.mark.parametrize("targets", [["mha"], ["mha", "lin0"]])
def test_attention_computes_the_weights_where_peft_counts_one_of_them_twice(targets: list[str], tmp_path: Path) -> None:
    """See PEFT issue 3774. With an update of zero for the output projection, the outputs are the same."""
    net, x = Attention().eval(), torch.randn(9, 10)
    theirs = of_peft(copy.deepcopy(net), {"target_modules": targets})
    for key, value in theirs.named_parameters():
        if "out_proj.lora_B" in key:
            nn.init.zeros_(value)
    theirs.save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match="applies the output projection of an attention twice"):
        load_adapter(net, tmp_path)
    torch.testing.assert_close(net(x), theirs(x))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Products, {"target_modules": [], "target_parameters": ["lin0.weight"]}),
        (
            Products,
            {"target_modules": [], "target_parameters": ["lin0.weight", "lin1.weight"], "r": 4, "lora_alpha": 3},
        ),
        (Mlp, {"target_modules": ["lin0"], "target_parameters": ["lin1.weight"], "r": 2}),
        (Words, {"target_modules": [], "target_parameters": ["emb.weight"], "r": 2, "use_rslora": True}),
        (TwoTables, {"target_modules": [], "target_parameters": ["both.first", "both.second"], "r": 3}),
    ],
)
def test_a_parameter_by_name_is_exchanged(make: type[nn.Module], options: Options, tmp_path: Path) -> None:
    net, x = make().eval(), INPUTS[make]()
    plain = copy.deepcopy(net)
    theirs = of_peft(copy.deepcopy(net), options)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    load_adapter(net, tmp_path / "theirs")
    torch.testing.assert_close(net(x), theirs(x))
    save_adapter(net, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT names the rank patterns that it did not need
        again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours")
    torch.testing.assert_close(again(x), net(x))
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert {key: value.shape for key, value in first.items()} == {key: value.shape for key, value in second.items()}
    merge(net)
    torch.testing.assert_close(net(x), theirs(x))


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"target_parameters": ["holder.weight"]}])
def test_parameters_that_peft_would_ignore_are_not_written_as_its_own(variant: Options, tmp_path: Path) -> None:
    """It has no DoRA of them, and adapts them only while their module is called."""
    net = Reading()
    plain, x = copy.deepcopy(net), torch.randn(3, 4)
    attach(net, LoRAConfig(**{"rank": 2, "target_modules": [], "target_parameters": ["called.weight"]} | variant))
    stir(net)
    save_adapter(net, tmp_path)
    with pytest.raises(KeyError, match="LORA_LIGHTNING"):
        peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    load_adapter(plain, tmp_path)
    torch.testing.assert_close(plain(x), net(x))
