"""Several adapters at once: their updates add up, some are trained and others frozen."""

from __future__ import annotations

import copy
import random
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_lightning import LoRAConfig, load_adapter, save_adapter
from lora_lightning.lora import (
    InertAdapterError,
    adapted_weights,
    adapter_names,
    adapter_parameters,
    adapter_state_dict,
    attach,
    base_fingerprint,
    delete_adapter,
    detach,
    disabled,
    is_untrained,
    lora_plus_param_groups,
    merge,
    merged,
    scaled,
    set_adapter,
    verify_adapters,
)
from tests.helpers import stir


class Net(nn.Module):
    """Layers that are called, and layers whose weights are read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, dtype=torch.float64)
        self.lstm = nn.LSTM(16, 5, dtype=torch.float64)
        self.attention = nn.MultiheadAttention(5, 1, dtype=torch.float64)
        self.head = nn.Linear(5, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.conv(x).flatten(1).view(len(x), 1, 16))
        return self.head(self.attention(y, y, y)[0]).flatten(1)


CONFIGS = [
    LoRAConfig(rank=2, alpha=3),
    LoRAConfig(rank=1, target_modules=["conv", "lstm.weight_ih_l0"], init="pissa"),
    LoRAConfig(rank=1, use_dora=True),
    LoRAConfig(rank=2, target_modules=["head", "conv"], use_dora=True, init="pissa", use_rslora=True),
    LoRAConfig(rank=2, target_modules=["in_proj_weight"], qkv="qv", alpha=1),
    LoRAConfig(rank=3, target_modules=["head"], use_rslora=True, bypass=(48, 4)),
    LoRAConfig(rank=1, target_modules=["lstm.weight_hh_l0", "out_proj"], init="gaussian"),
    LoRAConfig(rank=2, alpha=5, target_modules=["conv", "head", "out_proj"], lora_bias=True),
    LoRAConfig(rank=1, target_modules=["head", "lstm.weight_ih_l0"], init="mica", alpha=2),
    LoRAConfig(rank=1, target_modules=["conv", "head"], bias="lora_only", use_dora=True),
    LoRAConfig(rank=1, qkv="kv"),
]


@pytest.fixture
def net() -> Net:
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, 4, 4, dtype=torch.float64)


Tensors = dict[tuple[str, str], dict[str, Tensor]]


def tensors_of(net: nn.Module, name: str) -> Tensors:
    """Return copies of the tensors of adapters by layer and parameter, which can be differentiated.

    Those of parameters that are trained in full are under the name `in_full`.
    """
    found: Tensors = {}
    for key, value in adapter_state_dict(net, name).items():
        *layer, holder, leaf = key.replace(f".{name}.", ".").split(".")
        place = (".".join(layer), holder.removeprefix("lora_"))
        if not holder.startswith("lora_"):
            place, leaf = (".".join([*layer, holder]), leaf), "in_full"
        found.setdefault(place, {})[leaf] = value.detach().clone().requires_grad_()
    return found


def scale_of(config: LoRAConfig) -> float:
    return (config.alpha or config.rank) / (config.rank**0.5 if config.use_rslora else config.rank)


def update(weight: Tensor, values: dict[str, Tensor], config: LoRAConfig) -> Tensor:
    """Return W' - W of one adapter, by the formulas of the papers."""
    scale = scale_of(config)
    a, b, matrix = values["lora_A"], values["lora_B"], weight.flatten(1)
    if config.qkv and len(b) == 3 * matrix.shape[1]:
        b = torch.cat([part * (name in config.qkv) for part, name in zip(b.chunk(3), "qkv", strict=True)])
    product = scale * (b @ a)
    if config.init == "pissa":
        product = product - scale * (values["lora_B_initial"] @ values["lora_A_initial"]).detach()
    if config.use_dora:
        total = matrix + product
        norms = total.norm(dim=1).detach()
        return ((values["lora_magnitude_vector"] / norms)[:, None] * total - matrix).view(weight.shape)
    return product.view(weight.shape)


def oracle(plain: Net, stack: dict[str, LoRAConfig], values: dict[str, Tensors], x: Tensor) -> Tensor:
    """Return the output of the network with dense weights W + Σ ΔW, and Σ s B A x of bypasses."""
    weights = dict(plain.named_parameters())
    changed, around = dict(weights), torch.zeros(())
    for name in stack:  # biases that are trained in full, to which others may add
        for (layer, parameter), tensors in values[name].items():
            if "in_full" in tensors:
                changed[f"{layer}.{parameter}"] = tensors["in_full"]
    for name, config in stack.items():
        for (layer, parameter), tensors in values[name].items():
            if parameter == "bypass":
                around = around + scale_of(config) * x.flatten(1) @ tensors["lora_A"].T @ tensors["lora_B"].T
            elif "in_full" not in tensors:
                key = f"{layer}.{parameter}"
                changed[key] = changed[key] + update(weights[key], tensors, config)
                if config.lora_bias:
                    bias = f"{layer}.bias"
                    changed[bias] = changed[bias] + scale_of(config) * tensors["lora_bias"]
    return functional_call(plain, changed, (x,)) + around


@pytest.mark.parametrize("seed", range(32))
def test_a_stack_computes_the_sum_of_its_updates(net: Net, x: Tensor, seed: int, tmp_path: Path) -> None:
    """Outputs and gradients are those of dense weights W + Σ ΔW, also merged, copied, and loaded from folders."""
    draw = random.Random(seed)
    plain, digest = copy.deepcopy(net), base_fingerprint(net)
    chosen = draw.sample(CONFIGS, draw.randint(1, 4))
    stack = {f"adapter_{index}": config for index, config in enumerate(chosen)}
    for name, config in stack.items():
        attach(net, config, name)
        stir(net, 0.3)
    set_adapter(net, list(stack))
    if len(stack) > 1 and draw.random() < 0.4:
        gone = draw.choice(list(stack))
        delete_adapter(net, gone)
        del stack[gone]
        assert set(adapter_names(net)) == set(stack)
    trained = draw.sample(list(stack), draw.randint(0, len(stack)))
    set_adapter(net, list(stack), trained)

    values = {name: tensors_of(net, name) for name in stack}
    expected = oracle(plain, stack, values, x)
    torch.testing.assert_close(net(x), expected)
    parameters = dict(net.named_parameters())
    places = {key: place for key in parameters for place in [place_of(key, values)] if place is not None}
    wanted = {key for key, (name, _, leaf) in places.items() if name in trained and not is_fixed(stack[name], leaf)}
    assert {key for key, value in parameters.items() if value.requires_grad} == wanted
    assert {id(value) for value in adapter_parameters(net)} == {id(parameters[key]) for key in wanted}
    if trained:
        net(x).square().sum().backward()
        expected.square().sum().backward()
        for key, (name, place, leaf) in places.items():
            if key in wanted:
                torch.testing.assert_close(parameters[key].grad, values[name][place][leaf].grad)
            else:
                assert parameters[key].grad is None

    with disabled(net):
        torch.testing.assert_close(net(x), plain(x))
    in_full = {f"{layer}.{parameter}" for found in values.values() for layer, parameter in found} & set(parameters)
    if not in_full:
        assert base_fingerprint(net) == digest
    torch.testing.assert_close(copy.deepcopy(net)(x), expected)
    if not any(config.bypass for config in stack.values()):
        with merged(net):
            torch.testing.assert_close(net(x), expected)
        other = copy.deepcopy(net)
        merge(other)
        torch.testing.assert_close(other(x), expected)
        assert other.state_dict().keys() == plain.state_dict().keys()
    loaded = copy.deepcopy(plain)
    for name in stack:
        save_adapter(net, tmp_path / name, name)
        load_adapter(loaded, tmp_path / name, name, strict=True)
    set_adapter(loaded, list(stack))
    torch.testing.assert_close(loaded(x), expected)

    if trained:  # a training that is stopped after a step and goes on in another network, with what a checkpoint holds
        dense = [
            values[name][place][leaf] for name, place, leaf in (places[key] for key in parameters if key in wanted)
        ]
        optimizers = [sgd(dense), sgd(adapter_parameters(net))]
        for step in range(2):
            for optimizer, output in zip(optimizers, (oracle(plain, stack, values, x), net(x)), strict=True):
                optimizer.zero_grad()
                output.square().sum().backward()
                optimizer.step()
            if not step:
                state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizers[1].state_dict())
        resumed = copy.deepcopy(plain)
        for name, config in stack.items():
            attach(resumed, config, name)
        set_adapter(resumed, list(stack), trained)
        resumed.load_state_dict(state[0])
        optimizer = sgd(adapter_parameters(resumed))
        optimizer.load_state_dict(state[1])
        resumed(x).square().sum().backward()
        optimizer.step()
        assert torch.equal(resumed(x), net(x))
        torch.testing.assert_close(resumed(x), oracle(plain, stack, values, x))
    detach(net)
    assert torch.equal(net(x), plain(x))
    assert base_fingerprint(net) == digest


def sgd(parameters: list[Tensor]) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


def place_of(key: str, values: dict[str, Tensors]) -> tuple[str, tuple[str, str], str] | None:
    """Return the adapter that a parameter belongs to, and its place among the tensors."""
    for name, found in values.items():
        for place, tensors in found.items():
            layer, parameter = place
            if "in_full" in tensors and key == f"{layer}.{parameter}":
                return name, place, "in_full"
            for leaf in tensors:
                if key == f"{layer}.lora_{parameter}.{name}.{leaf}".lstrip("."):
                    return name, place, leaf
    return None


def is_fixed(config: LoRAConfig, leaf: str) -> bool:
    """Return whether a tensor is not trained: B of MiCA, which is a parameter all the same."""
    return config.init == "mica" and leaf == "lora_B"


IN_PEFT = [
    LoRAConfig(rank=2, alpha=3),
    LoRAConfig(rank=3, target_modules=["2", "4"], use_rslora=True, init="gaussian"),
    LoRAConfig(rank=1, use_dora=True),
    LoRAConfig(rank=2, target_modules=["4"], init="pissa"),
    LoRAConfig(rank=2, target_modules=["0", "4"], use_dora=True, init="pissa"),
    LoRAConfig(rank=2, alpha=5, lora_bias=True),
    LoRAConfig(rank=2, target_modules=["2", "4"], init="mica", alpha=1),
    LoRAConfig(rank=1, target_modules=["0", "4"], bias="lora_only"),
    LoRAConfig(rank=1, target_modules=["0"], modules_to_save=["4"], dropout=0.2),
]


@pytest.mark.filterwarnings("ignore:.*have invalid shape")
@pytest.mark.parametrize("seed", range(16))
def test_peft_computes_the_same_with_the_folders_of_a_stack(seed: int, tmp_path: Path) -> None:
    """With each alone, and with all of them where PEFT adds updates up: without DoRA and what is trained in full."""
    draw = random.Random(seed)
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 4))
    plain, x = copy.deepcopy(base.eval()), torch.randn(5, 3, 4, 4)
    stack = {}
    for index, config in enumerate(draw.sample(IN_PEFT, draw.randint(1, 4))):
        stack[f"adapter_{index}"] = config
        attach(base, config, f"adapter_{index}")
        stir(base, 0.2)
        base.eval()
    for name in stack:
        save_adapter(base, tmp_path / name, name)
        set_adapter(base, name)
        alone = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / name).eval()
        torch.testing.assert_close(alone(x), base(x))
    adds_up = {name: each for name, each in stack.items() if not each.use_dora and each.bias == "none"}
    adds_up = {name: each for name, each in adds_up.items() if not each.modules_to_save}
    if len(adds_up) > 1:
        first, *others = adds_up
        other = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / first, first)
        for name in others:
            other.load_adapter(tmp_path / name, name)
        other.base_model.set_adapter(list(adds_up))
        set_adapter(base, list(adds_up))
        torch.testing.assert_close(other.eval()(x), base(x))


def test_two_plain_adapters_equal_pefts_to_the_bit(tmp_path: Path) -> None:
    """Also their gradients, with one of them frozen."""
    base = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2))
    targets = ["0", "2", "4"]
    other = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets), "first"
    )
    other.add_adapter("second", peft.LoraConfig(r=2, target_modules=targets, use_rslora=True))
    with torch.no_grad():
        for key, value in other.named_parameters():
            if "lora_B" in key:
                value.normal_()
    other.save_pretrained(str(tmp_path))
    for name in ("first", "second"):
        load_adapter(base, tmp_path / name, name)
    x = torch.randn(6, 12)
    for names in (["first", "second"], ["second", "first"]):
        set_adapter(base, names, trained=["second"])
        other.base_model.set_adapter(names)
        assert torch.equal(base(x), other(x))
    for each in (base, other):
        each(x).square().sum().backward()
    for weight in adapted_weights(base, "second"):
        theirs = other.get_submodule(f"base_model.model.{weight.layer_name}")
        assert torch.equal(weight.factors[0].grad, theirs.lora_A["second"].weight.grad.view_as(weight.factors[0]))
        assert torch.equal(weight.factors[1].grad, theirs.lora_B["second"].weight.grad.view_as(weight.factors[1]))
    assert all(value.grad is None for weight in adapted_weights(base, "first") for value in weight.factors)


def test_a_frozen_adapter_keeps_every_bit_while_another_is_trained_on_it(net: Net, x: Tensor) -> None:
    attach(net, CONFIGS[0], "a")
    stir(net, 0.3)
    before = net(x)
    attach(net, CONFIGS[2], "b")
    set_adapter(net, ["a", "b"], trained="b")
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)  # an untrained adapter changes no bit of a stack
    a = {key: value.clone() for key, value in adapter_state_dict(net, "a").items()}
    optimizer = torch.optim.AdamW(lora_plus_param_groups(net, 1e-2, 16), weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(value, a[key]) for key, value in adapter_state_dict(net, "a").items())
    assert not torch.equal(net(x), before)
    set_adapter(net, "a")
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)
    assert all(value.requires_grad for weight in adapted_weights(net) for value in weight.factors)


def test_the_state_is_that_of_the_active_ones(net: Net) -> None:
    for name in ("a", "b", "c"):
        attach(net, CONFIGS[0], name)
    assert is_untrained(net)
    stir(net)
    set_adapter(net, ["a", "b"], trained=["a"])
    assert adapter_names(net) == ["a", "b", "c"]
    assert is_untrained(net)
    assert {key.split(".")[-2] for key in adapter_state_dict(net)} == {"a", "b"}
    set_adapter(net, ["b", "c"], trained=[])
    assert not is_untrained(net)
    assert not any(value.requires_grad for value in net.parameters())
    assert adapter_parameters(net) == []


def test_scaling_applies_to_the_whole_sum(net: Net, x: Tensor) -> None:
    attach(net, LoRAConfig(rank=1, target_modules=["head"]), "a")
    stir(net)
    attach(net, LoRAConfig(rank=2, target_modules=["head"], use_dora=True), "b")
    stir(net)
    set_adapter(net, ["a", "b"])
    both = net(x)
    with disabled(net):
        base = net(x)
    with scaled(net, 0):
        torch.testing.assert_close(net(x), base)
    with scaled(net, 1):
        torch.testing.assert_close(net(x), both)


def test_frozen_ones_are_verified_as_well_and_left_as_they_were(net: Net, x: Tensor) -> None:
    attach(net, CONFIGS[0], "a")
    stir(net)
    attach(net, CONFIGS[2], "b")
    set_adapter(net, ["a", "b"], trained=["b"])
    state = {key: value.clone() for key, value in net.state_dict().items()}
    verify_adapters(net, x)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert {key.split(".")[-2] for key, value in net.named_parameters() if value.requires_grad} == {"b"}
    net.unused = nn.Linear(3, 3)
    attach(net, LoRAConfig(rank=1, target_modules=["unused"]), "c")
    attach(net, LoRAConfig(rank=1, target_modules=["unused"]), "d")
    set_adapter(net, ["a", "c", "d"], trained=["a"])
    with pytest.raises(InertAdapterError, match=r"'unused \(c\)' .*; 'unused \(d\)'"):
        verify_adapters(net, x)


class TestSomeOfThemDisabled:
    """`disabled(net, names)` computes with the adapters that are left, and ends as it began."""

    @pytest.fixture
    def names(self, net: Net) -> list[str]:
        configs = [CONFIGS[0], CONFIGS[2], CONFIGS[6], LoRAConfig(rank=1, target_modules=["conv"], bias="lora_only")]
        for name, config in zip("abcd", configs, strict=True):
            attach(net, config, name)
            stir(net, 0.3)
        set_adapter(net, list("abcd"), trained=["b", "d"])
        return list("abcd")

    @pytest.mark.parametrize("left_out", ["b", ["b", "d"], ["a", "c"], [], ["a", "b", "c", "d"]])
    def test_the_others_add_up(self, net: Net, x: Tensor, names: list[str], left_out: str | list[str]) -> None:
        whole, trains = net(x), {key for key, value in net.named_parameters() if value.requires_grad}
        other = copy.deepcopy(net)
        left = [name for name in names if name not in left_out]
        if left:
            set_adapter(other, left)
        else:
            detach(other)
        expected = other(x)
        with disabled(net):
            base = net(x)
        with disabled(net, left_out):
            torch.testing.assert_close(net(x), expected)
            with disabled(net, "a"), disabled(net):
                assert torch.equal(net(x), base)
            torch.testing.assert_close(net(x), expected)
        assert torch.equal(net(x), whole)
        assert {key for key, value in net.named_parameters() if value.requires_grad} == trains

    def test_it_goes_before_merged_weights(self, net: Net, x: Tensor, names: list[str]) -> None:
        with disabled(net, "b"):
            without = net(x)
        with merged(net):
            both = net(x)
            with disabled(net, "b"):
                assert torch.equal(net(x), without)
            assert torch.equal(net(x), both)

    def test_a_name_that_does_not_exist_is_refused(self, net: Net, x: Tensor, names: list[str]) -> None:
        whole = net(x)
        with pytest.raises(ValueError, match="no adapters named 'z'; it has a, "), disabled(net, ["a", "z"]):
            pass
        assert torch.equal(net(x), whole)


class TestModulesTrainedInFull:
    HEAD = LoRAConfig(rank=1, target_modules=["conv"], modules_to_save=["head"])
    ATTENTION = LoRAConfig(rank=1, target_modules=["conv"], modules_to_save=["attention"])

    def test_they_are_trained_or_frozen_with_their_adapters(self, net: Net, x: Tensor) -> None:
        attach(net, self.HEAD, "a")
        stir(net, 0.3)
        attach(net, self.ATTENTION, "b")
        stir(net, 0.3)
        digest = base_fingerprint(net)
        set_adapter(net, ["a", "b"], trained=["b"])
        assert base_fingerprint(net) != digest  # which leaves out what is trained in full
        assert not net.head.weight.requires_grad
        assert net.attention.in_proj_weight.requires_grad
        assert {id(value) for value in adapter_parameters(net)} == {id(p) for p in net.parameters() if p.requires_grad}
        head, both = net.head.weight.clone(), net(x)
        assert torch.equal(adapter_state_dict(net, "a")["head.weight"], head)
        set_adapter(net, "b")
        assert not torch.equal(net.head.weight, head)
        set_adapter(net, ["b", "a"])
        torch.testing.assert_close(net(x), both)
        other = copy.deepcopy(net)
        merge(other)
        torch.testing.assert_close(other(x), both)

    def test_two_of_the_same_module_are_refused_by_name(self, net: Net, x: Tensor) -> None:
        attach(net, self.HEAD, "a")
        attach(net, CONFIGS[0], "plain")
        attach(net, self.HEAD, "b")
        stir(net)
        y = net(x)
        with pytest.raises(ValueError, match=r"'a', 'b' cannot be active together: .* head.weight, head.bias in full"):
            set_adapter(net, ["a", "plain", "b"])
        assert torch.equal(net(x), y)
        assert adapter_names(net)[0] == "b"
        set_adapter(net, ["a", "plain"])

    def test_an_adapter_inside_such_a_module_keeps_its_own_values(self, net: Net, x: Tensor) -> None:
        attach(net, LoRAConfig(rank=1, target_modules=["head"]), "inside")
        stir(net, 0.3)
        inside = net(x)
        attach(net, self.HEAD, "a")
        stir(net, 0.3)
        set_adapter(net, "inside")
        assert torch.equal(net(x), inside)
        assert not any("lora_" in key for key in adapter_state_dict(net, "a") if key.startswith("head."))
        delete_adapter(net, "inside")
        set_adapter(net, "a")


@pytest.mark.parametrize(
    ("names", "trained", "message"),
    [
        (["a", "z"], None, "no adapters named 'z'; it has b, a"),
        (["a", "a"], None, r"\['a', 'a'\] cannot become active: expected different names"),
        ([], None, r"\[\] cannot become active"),
        (["a"], ["b"], r"trained=\['b'\] cannot be trained, since only 'a' become active"),
    ],
)
def test_names_that_make_no_sense_are_refused(
    net: Net, names: list[str], trained: list[str] | None, message: str
) -> None:
    attach(net, CONFIGS[0], "a")
    attach(net, CONFIGS[0], "b")
    with pytest.raises(ValueError, match=message):
        set_adapter(net, names, trained)
    assert adapter_names(net) == ["b", "a"]


def test_a_folder_holds_one_of_them(net: Net, x: Tensor, tmp_path: Path) -> None:
    plain = copy.deepcopy(net)
    attach(net, CONFIGS[0], "a")
    stir(net)
    alone = net(x)
    attach(net, CONFIGS[0], "b")
    stir(net)
    set_adapter(net, ["a", "b"])
    with pytest.raises(ValueError, match=r"The adapters 'a', 'b' of this Net are active: .* for example name='b'"):
        save_adapter(net, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="no adapters named 'z'"):
        save_adapter(net, tmp_path / "none", name="z")
    set_adapter(net, "b")
    save_adapter(net, tmp_path / "a", name="a")  # an inactive one
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(plain, tmp_path / "a")
    torch.testing.assert_close(plain(x), alone)


def test_the_removed_one_no_longer_counts(net: Net, x: Tensor) -> None:
    for name in ("a", "b", "c"):
        attach(net, CONFIGS[0], name)
        stir(net)
    set_adapter(net, ["a", "c"], trained=["c"])
    both = net(x)
    delete_adapter(net, "b")
    assert torch.equal(net(x), both)
    delete_adapter(net, "c")
    assert adapter_names(net) == ["a"]
    assert not any(value.requires_grad for value in net.parameters())  # a stays frozen
    attach(net, CONFIGS[0], "d")
    delete_adapter(net, "d")
    assert all(value.requires_grad for value in adapter_parameters(net))
    delete_adapter(net, "a")
    assert all(value.requires_grad for value in net.parameters())
