"""The verbs: what they change, and what they leave as it was, bit for bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lora_lightning import LoRAConfig, RichBoyNet
from lora_lightning.lora import (
    adapter_parameters,
    adapter_state_dict,
    attach,
    base_fingerprint,
    detach,
    disabled,
    is_adapted,
    merge,
    merged,
)
from lora_lightning.lora.fingerprint import digests
from tests.helpers import same, state, stir


def test_rank_1_adds_a_quarter_percent_to_the_over_sized_mlp() -> None:
    net = RichBoyNet()
    assert sum(p.numel() for p in net.parameters()) == 2_807_010
    assert attach(net, LoRAConfig(rank=1)) == ["linear1", "linear2", "linear3"]
    assert sum(p.numel() for p in adapter_parameters(net)) == 6_794
    assert {p for p in net.parameters() if p.requires_grad} == set(adapter_parameters(net))


def test_base_keys_and_types_stay(mlp: nn.Sequential) -> None:
    keys = set(mlp.state_dict())
    attach(mlp, LoRAConfig(rank=2))
    assert set(mlp.state_dict()) - set(adapter_state_dict(mlp)) == keys
    assert set(adapter_state_dict(mlp)) == {
        f"{layer}.lora_weight.default.lora_{factor}" for layer in (0, 3) for factor in "AB"
    }
    assert isinstance(mlp[0], nn.Linear)
    assert isinstance(mlp[1], nn.BatchNorm1d)


def test_a_plain_checkpoint_loads_into_an_adapted_model(mlp: nn.Sequential) -> None:
    plain = state(mlp)
    attach(mlp, LoRAConfig(rank=2))
    nn.init.zeros_(dict(mlp.named_parameters())["0.weight"])
    missing, unexpected = mlp.load_state_dict(plain, strict=False)
    assert set(missing) == set(adapter_state_dict(mlp))
    assert not unexpected
    assert torch.equal(mlp.state_dict()["0.weight"], plain["0.weight"])


def test_detach_gives_the_module_back_bitwise_trainability_and_mode_too(mlp: nn.Sequential) -> None:
    mlp[3].bias.requires_grad_(False)
    before, types = state(mlp), [type(layer) for layer in mlp]
    trainable = {name: p.requires_grad for name, p in mlp.named_parameters()}
    attach(mlp, LoRAConfig(rank=2))
    stir(mlp)
    mlp.train()
    mlp(torch.randn(5, 8))
    detach(mlp)
    assert same(state(mlp), before)
    assert [type(layer) for layer in mlp] == types
    assert {name: p.requires_grad for name, p in mlp.named_parameters()} == trainable
    assert all(layer.training for layer in mlp)
    assert not is_adapted(mlp)
    assert not any("lora" in name for layer in mlp.modules() for name in vars(layer))


def test_training_moves_adapters_alone(mlp: nn.Sequential) -> None:
    before, digest = state(mlp), base_fingerprint(mlp)
    attach(mlp, LoRAConfig(rank=2))
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=0.1, weight_decay=0.1)
    mlp.train()
    for _ in range(3):
        optimizer.zero_grad()
        mlp(torch.randn(5, 8)).square().sum().backward()
        optimizer.step()
    assert all(parameter.abs().sum() > 0 for parameter in adapter_parameters(mlp))
    assert all(torch.equal(mlp.state_dict()[key], value) for key, value in before.items())
    assert base_fingerprint(mlp) == digest


def test_frozen_batchnorm_normalises_with_its_statistics_in_train_mode(mlp: nn.Sequential) -> None:
    x = torch.randn(5, 8)
    expected = mlp.eval()(x)
    attach(mlp, LoRAConfig(rank=2))
    mlp.train()
    assert torch.equal(mlp(x), expected)


def test_disabled_is_the_base_also_after_an_error(mlp: nn.Sequential) -> None:
    mlp.eval()
    x = torch.randn(5, 8)
    base = mlp(x)
    attach(mlp, LoRAConfig(rank=2))
    stir(mlp)
    adapted = mlp(x)
    assert not torch.equal(adapted, base)
    with disabled(mlp), disabled(mlp):
        assert torch.equal(mlp(x), base)
    with pytest.raises(KeyError), disabled(mlp):
        raise KeyError
    assert torch.equal(mlp(x), adapted)


def test_merged_agrees_and_gives_the_weights_back_bitwise(mlp: nn.Sequential) -> None:
    mlp.double().eval()
    attach(mlp, LoRAConfig(rank=2, alpha=5))
    stir(mlp)
    x = torch.randn(5, 8, dtype=torch.float64)
    before, adapted = state(mlp), mlp(x)
    with merged(mlp):
        torch.testing.assert_close(mlp(x), adapted)
        assert not torch.equal(mlp[0].weight, before["0.weight"])
        with merged(mlp):
            torch.testing.assert_close(mlp(x), adapted)
    assert same(state(mlp), before)
    assert torch.equal(mlp(x), adapted)


def test_merge_leaves_a_plain_trainable_model_with_the_same_answers(mlp: nn.Sequential) -> None:
    mlp.double().eval()
    attach(mlp, LoRAConfig(rank=2, alpha=5))
    stir(mlp)
    x = torch.randn(5, 8, dtype=torch.float64)
    adapted = mlp(x)
    merge(mlp)
    torch.testing.assert_close(mlp(x), adapted)
    assert type(mlp[0]) is nn.Linear
    assert all(parameter.requires_grad for parameter in mlp.parameters())


def test_fingerprint_sees_values_names_dtypes_and_buffers_but_no_adapter(mlp: nn.Sequential) -> None:
    digest = base_fingerprint(mlp)
    attach(mlp, LoRAConfig(rank=2))
    stir(mlp)
    assert base_fingerprint(mlp) == digest
    with disabled(mlp):
        assert base_fingerprint(mlp) == digest
    with merged(mlp):
        assert base_fingerprint(mlp) == digest
    detach(mlp)
    assert base_fingerprint(copy.deepcopy(mlp)) == digest
    assert base_fingerprint(copy.deepcopy(mlp).double()) != digest
    assert base_fingerprint(nn.Sequential(*list(mlp)[::-1])) != digest
    mlp[1].running_mean[0] += 1e-6
    assert base_fingerprint(mlp) != digest


def test_digests_name_the_tensor_that_changed_whatever_the_number_of_threads(mlp: nn.Sequential) -> None:
    attach(mlp, LoRAConfig(rank=2))
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(digests(mlp))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]
    assert set(found[0]) == {key for key in mlp.state_dict() if "lora" not in key}
    assert len(set(found[0].values())) > 1
    stir(mlp)
    assert digests(mlp) == found[0]
    mlp[1].running_mean[0] += 1e-6
    now = digests(mlp)
    assert [key for key in now if now[key] != found[0][key]] == ["1.running_mean"]
    assert list(digests(mlp, only={"1.running_mean"})) == ["1.running_mean"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_adapted_and_independent(mlp: nn.Sequential, copied) -> None:
    attach(mlp, LoRAConfig(rank=2))
    stir(mlp)
    x = torch.randn(5, 8)
    other = copied(mlp)
    assert torch.equal(other(x), mlp(x))
    detach(other)
    assert is_adapted(mlp)
    assert not is_adapted(other)
    mean = mlp[1].running_mean.clone()
    other.train()(x)
    mlp.train()(x)
    assert not torch.equal(other[1].running_mean, mean)
    assert torch.equal(mlp[1].running_mean, mean)


def test_hooks_and_references_survive(mlp: nn.Sequential) -> None:
    first, calls = mlp[0], []
    first.register_forward_hook(lambda *_: calls.append("hook"))
    weight = first.weight
    attach(mlp, LoRAConfig(rank=2))
    mlp(torch.randn(2, 8))
    assert calls == ["hook"]
    assert mlp[0] is first
    assert dict(mlp.named_parameters())["0.weight"] is weight


def test_pissa_of_weights_that_are_not_finite_is_refused_and_changes_nothing(mlp: nn.Sequential) -> None:
    with torch.no_grad():
        mlp[3].weight[1, 2] = float("nan")
    with pytest.raises(
        ValueError, match=r"Layer '3' has weights that are not finite, so PiSSA cannot compute singular"
    ):
        attach(mlp, LoRAConfig(rank=2, init="pissa"))
    assert not is_adapted(mlp)
    assert all(parameter.requires_grad for parameter in mlp.parameters())


def test_a_target_of_a_large_network_that_matches_nothing_is_answered_with_close_names() -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(200)))
    with pytest.raises(
        ValueError,
        match=r"Targets \['19o'\] match no layer .* can be adapted: 19\d?, .* and 180 more\. "
        r"For others, set target_parameters\.$",
    ):
        attach(net, LoRAConfig(rank=2, target_modules=["19o"]))


def test_merging_a_tied_weight_is_refused_and_changes_nothing() -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    net["head"].weight = net["embed"].weight
    attach(net, LoRAConfig(rank=2))
    stir(net)
    before = state(net)
    for verb in (merge, lambda module: merged(module).__enter__()):
        with pytest.raises(ValueError, match=r"weight of 'embed' is shared \(embed.weight, head.weight\)"):
            verb(net)
    assert same(state(net), before)


class TestRefusals:
    """`attach` either does all or changes nothing, and its message names what exists."""

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (LoRAConfig(target_modules=["linear9"]), r"Targets \['linear9'\] match no layer .* can be adapted: 0, 3\."),
            (LoRAConfig(target_modules=["1"]), r"Targets \['1'\] match no layer"),
            (LoRAConfig(target_modules=["0", "no"]), r"Targets \['no'\] match no layer"),
            (LoRAConfig(target_modules="conv.*"), r"Targets \['conv.\*'\] match no layer"),
            (
                LoRAConfig(rank=1, rank_pattern={"7": 2}),
                r"rank_pattern: \['7'\] match no adapted layer. There are: 0, 3\.",
            ),
            (LoRAConfig(exclude_modules=["0", "3"]), r"No layer is left to adapt"),
        ],
    )
    def test_what_can_not_be_attached(self, mlp: nn.Sequential, config: LoRAConfig, message: str) -> None:
        before = state(mlp)
        with pytest.raises(ValueError, match=message):
            attach(mlp, config)
        assert same(state(mlp), before)
        assert all(parameter.requires_grad for parameter in mlp.parameters())
        assert type(mlp[0]) is nn.Linear
        assert type(mlp[1]) is nn.BatchNorm1d

    def test_a_model_without_supported_layers(self) -> None:
        with pytest.raises(
            ValueError,
            match=r"No layer is left to adapt\. .* can be adapted: none\. For others, set target_parameters",
        ):
            attach(nn.Sequential(nn.ReLU()), LoRAConfig())

    def test_attaching_twice(self, mlp: nn.Sequential) -> None:
        attach(mlp, LoRAConfig(rank=1))
        with pytest.raises(ValueError, match=r"already has adapters on \['0', '3'\]"):
            attach(mlp, LoRAConfig(rank=1))

    def test_detaching_what_is_not_adapted_or_adapted_further_in(self, mlp: nn.Sequential) -> None:
        with pytest.raises(ValueError, match=r"Sequential has no adapters of its own. Call attach"):
            detach(mlp)
        outer = nn.Sequential(mlp)
        attach(mlp, LoRAConfig(rank=1))
        with pytest.raises(ValueError, match=r"Its submodule '0' has adapters: pass that one"):
            merge(outer)

    def test_merging_into_a_weight_that_is_computed(self, mlp: nn.Sequential) -> None:
        prune.random_unstructured(mlp[0], "weight", amount=0.5)
        attach(mlp, LoRAConfig(rank=1))
        stir(mlp)
        before = state(mlp)
        with pytest.raises(ValueError, match=r"weight of '0' is computed from other parameters \(pruned, normed or"):
            merge(mlp)
        assert same(state(mlp), before)
