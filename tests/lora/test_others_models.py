"""Models as others build them: tied, compiled, scripted, parametrized, on meta, in low precision."""

from __future__ import annotations

import copy
import logging
from abc import ABC
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lora_lightning import LoRAConfig, load_adapter, save_adapter
from lora_lightning.lora import (
    adapted_weights,
    adapter_names,
    adapter_parameters,
    adapter_state_dict,
    attach,
    base_fingerprint,
    detach,
    disabled,
    is_adapted,
    merge,
    merged,
    set_adapter,
)
from tests.helpers import same, state, stir
from tests.lora.architectures import all_linear, make


class Tied(nn.Module):
    """A language model in miniature: the head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.body(self.embed(index)).relu())


class TestTiedModulesTrainedWhole:
    CONFIG = LoRAConfig(rank=2, target_modules=["body"], modules_to_save=["head"])

    def test_the_head_trains_and_the_frozen_embedding_does_not(self, caplog: pytest.LogCaptureFixture) -> None:
        net = Tied()
        plain, before = copy.deepcopy(net), state(net)
        attach(net, self.CONFIG)
        assert "head.weight is tied to embed.weight" in caplog.text
        optimizer = torch.optim.SGD(adapter_parameters(net), lr=0.1)
        net(torch.arange(6)).square().sum().backward()
        optimizer.step()
        assert torch.equal(net.embed.weight, before["embed.weight"])
        assert not torch.equal(net.head.weight, before["head.weight"])
        assert set(adapter_state_dict(net)) == {
            "body.lora_weight.default.lora_A",
            "body.lora_weight.default.lora_B",
            "head.weight",
        }
        with disabled(net):
            assert torch.equal(net(torch.arange(6)), plain(torch.arange(6)))

    def test_detach_ties_them_again(self) -> None:
        net = Tied()
        before = state(net)
        attach(net, self.CONFIG)
        stir(net)
        detach(net)
        assert same(state(net), before)
        assert net.head.weight is net.embed.weight
        assert net.embed.weight.requires_grad

    def test_switching_adapters_keeps_each_ones_head(self) -> None:
        net = Tied()
        before = state(net)
        attach(net, self.CONFIG, name="a")
        stir(net)
        head = net.head.weight.detach().clone()
        attach(net, LoRAConfig(rank=1, target_modules=["body"]), name="b")
        assert net.head.weight is net.embed.weight
        set_adapter(net, "a")
        assert adapter_names(net) == ["a", "b"]
        assert torch.equal(net.head.weight, head)
        assert torch.equal(net.embed.weight, before["embed.weight"])

    def test_a_folder_of_peft_leaves_the_embedding_alone(self, tmp_path: Path) -> None:
        peft = pytest.importorskip("peft")
        base = Tied()
        other = peft.get_peft_model(
            copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])
        )
        with torch.no_grad():
            for parameter in other.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        other.save_pretrained(tmp_path)
        net = copy.deepcopy(base)
        load_adapter(net, tmp_path)
        assert torch.equal(net.embed.weight, base.embed.weight)
        torch.testing.assert_close(net(torch.arange(6)), other(torch.arange(6)))

    def test_modules_that_are_trained_together_stay_tied(self) -> None:
        net = Tied()
        attach(net, LoRAConfig(rank=2, target_modules=["body"], modules_to_save=["head", "embed"]))
        assert net.head.weight is net.embed.weight
        stir(net)
        detach(net)
        assert net.head.weight is net.embed.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config", [LoRAConfig(rank=2), LoRAConfig(rank=2, use_dora=True), LoRAConfig(rank=2, init="pissa")]
)
def test_adapters_stay_in_float32_when_the_model_is_converted_after_they_were_attached(
    config: LoRAConfig, dtype: torch.dtype
) -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    attach(net, config)
    stir(net)
    before = {key: value.clone() for key, value in adapter_state_dict(net).items()}
    parameters = adapter_parameters(net)
    net.to(dtype)
    assert net[0].weight.dtype == dtype
    assert same(adapter_state_dict(net), before)
    assert all(a is b for a, b in zip(parameters, adapter_parameters(net), strict=True))
    net(torch.randn(2, 8, dtype=dtype)).float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in adapter_parameters(net))


def test_a_module_trained_whole_is_restored_in_the_precision_that_the_model_has_by_then() -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    attach(net, LoRAConfig(rank=2, target_modules=["0"], modules_to_save=["1"]))
    net.bfloat16()
    with disabled(net):
        assert net(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16


class TestMemoryThatIsShared:
    def test_merging_a_view_into_another_parameter_is_refused(self) -> None:
        net = nn.ModuleDict({"all": nn.Linear(4, 8, bias=False), "part": nn.Linear(4, 4, bias=False)})
        net["part"].weight = nn.Parameter(net["all"].weight.detach()[4:])
        attach(net, LoRAConfig(rank=2, target_modules=["part"]))
        stir(net)
        before = state(net)
        with pytest.raises(ValueError, match=r"weight of 'part' is shared \(all.weight, part.weight\)"), merged(net):
            pass
        assert same(state(net), before)

    def test_neighbours_in_one_block_of_memory_are_merged(self) -> None:
        block = torch.randn(8, 4)
        net = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
        net["a"].weight, net["b"].weight = nn.Parameter(block[:4]), nn.Parameter(block[4:])
        attach(net, LoRAConfig(rank=2, target_modules=["a"]))
        stir(net)
        other = net["b"].weight.clone()
        merge(net)
        assert torch.equal(net["b"].weight, other)

    def test_a_layer_under_two_names_is_one_layer(self) -> None:
        class TwoNames(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
                self.head = self.model[2]

            def forward(self, x: Tensor) -> Tensor:
                return self.model(x)

        net, x = TwoNames(), torch.randn(3, 4)
        attach(net, LoRAConfig(rank=2))
        stir(net)
        y = net(x)
        with merged(net):
            torch.testing.assert_close(net(x), y)
        merge(net)
        torch.testing.assert_close(net(x), y)


class InPlace(nn.Module):
    """Operations in place on what an adapted layer returned, as torchvision's and transformers' Swin V2 have them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.first(x))
        z = self.second(y)
        z += x
        return nn.functional.dropout(z, 0.0, inplace=True)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (2, 2, 3, 8), (8,)])
def test_what_follows_a_layer_may_work_in_place(shape: tuple[int, ...]) -> None:
    net, x = InPlace(), torch.randn(shape)
    attach(net, LoRAConfig(rank=2, alpha=3))
    stir(net)
    dense = copy.deepcopy(net)
    merge(dense)
    x.requires_grad_()
    y = net(x)
    torch.testing.assert_close(y, dense(x))
    [gradient] = torch.autograd.grad(y.square().sum(), x)
    [expected] = torch.autograd.grad(dense(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the compiler's own modules
class TestCompiled:
    def test_a_compiled_module_is_adapted_like_the_one_inside(self, tmp_path: Path) -> None:
        torch.compiler.reset()
        net, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(4, 8)
        compiled = torch.compile(net, backend="eager")
        base = compiled(x)
        digest = base_fingerprint(compiled)
        assert attach(compiled, LoRAConfig(rank=2)) == ["0", "2"]
        assert set(adapter_state_dict(compiled)) == {f"{n}.lora_weight.default.lora_{f}" for n in (0, 2) for f in "AB"}
        stir(compiled)
        assert len(adapter_parameters(compiled)) == 4
        y = compiled(x)
        assert not torch.allclose(y, base)
        torch.testing.assert_close(y, net(x))
        with disabled(compiled):
            torch.testing.assert_close(compiled(x), base)
        assert base_fingerprint(compiled) == digest
        save_adapter(compiled, tmp_path)
        merge(compiled)
        torch.testing.assert_close(compiled(x), y)
        assert not is_adapted(net)

    def test_adapters_made_on_meta_answer_once_they_are_loaded(self) -> None:
        torch.compiler.reset()
        net, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(4, 8)
        with torch.device("meta"):
            blank = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        for each in (net, blank):
            attach(each, LoRAConfig(rank=2))
        stir(net)
        blank.to_empty(device="cpu").load_state_dict(net.state_dict())
        torch.testing.assert_close(blank(x), net(x))
        torch.testing.assert_close(torch.compile(blank, backend="eager")(x), net(x))


def test_a_module_set_up_by_fabric_is_adapted() -> None:
    from lightning.fabric import Fabric

    net, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(4, 8)
    wrapped = Fabric(accelerator="cpu").setup(net)
    assert attach(wrapped, LoRAConfig(rank=2)) == ["0", "2"]
    stir(wrapped)
    with disabled(wrapped):
        base = wrapped(x)
    assert not torch.allclose(wrapped(x), base)


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.jit.script(nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.*:DeprecationWarning", "ignore:.*torch.jit.script.*:FutureWarning"
)
def test_a_scripted_module_inside_is_left_alone() -> None:
    net, x = Scripted(), torch.randn(2, 8)
    y = net(x)
    assert attach(net, LoRAConfig(rank=2)) == ["head"]
    stir(net)
    with disabled(net):
        assert torch.equal(net(x), y)
    with merged(net):
        assert not torch.allclose(net(x), y)
    detach(net)
    assert torch.equal(net(x), y)


class Layer(ABC, nn.Linear):
    """A layer whose first base is no module, as in pytorch-forecasting."""

    made: ClassVar[list[str]] = []

    def __init_subclass__(cls) -> None:
        Layer.made.append(cls.__name__)


class Recurrent(ABC, nn.LSTM):
    """A recurrent module whose first base is no module."""


class Norm(ABC, nn.BatchNorm1d):
    """A norm layer whose first base is no module."""


class TestClassesWhoseFirstBaseIsNoModule:
    def test_are_adapted_merged_and_detached(self) -> None:
        torch.manual_seed(0)
        net, x = nn.ModuleDict({"layer": Layer(4, 4), "norm": Norm(4), "lstm": Recurrent(4, 3)}), torch.randn(5, 4)

        def output(net: nn.ModuleDict) -> Tensor:
            return net["lstm"](net["norm"](net["layer"](x)))[0]

        plain = copy.deepcopy(net).eval()
        assert attach(net, LoRAConfig(rank=2)) == ["layer", "lstm.weight_ih_l0", "lstm.weight_hh_l0"]
        assert torch.equal(output(net), output(plain))
        stir(net)
        adapted = output(net)
        assert not torch.allclose(adapted, output(plain), atol=1e-3)
        assert torch.equal(output(copy.deepcopy(net)), adapted)
        merging = copy.deepcopy(net)
        merge(merging)
        assert type(merging["layer"]) is Layer
        torch.testing.assert_close(output(merging.eval()), adapted)
        detach(net)
        assert [type(child) for child in net.children()] == [Layer, Norm, Recurrent]
        assert torch.equal(output(net.eval()), output(plain))

    def test_a_registry_of_classes_gets_no_name_twice(self) -> None:
        attach(nn.Sequential(Layer(4, 4)), LoRAConfig(rank=2))
        assert len(Layer.made) == len(set(Layer.made)) > 0


class TestBiases:
    def test_a_bias_may_be_a_buffer(self) -> None:
        layer = nn.Linear(8, 6)
        bias = layer.bias.detach().clone()
        del layer.bias
        layer.register_buffer("bias", bias)
        self.check(layer)

    def test_a_bias_may_be_computed(self) -> None:
        class Double(nn.Module):
            def forward(self, bias: Tensor) -> Tensor:
                return 2 * bias

        layer = nn.Linear(8, 6)
        nn.utils.parametrize.register_parametrization(layer, "bias", Double())
        self.check(layer)

    def test_a_weight_may_be_computed(self) -> None:
        self.check(parametrizations.weight_norm(nn.Linear(8, 6)))

    def check(self, layer: nn.Module) -> None:
        net, x = nn.Sequential(layer), torch.randn(3, 8)
        base = net(x)
        for dora in (False, True):
            attach(net, LoRAConfig(rank=2, use_dora=dora))
            assert torch.equal(net(x), base)
            stir(net)
            y = net(x)
            with torch.no_grad():
                torch.testing.assert_close(net(x), y)
            with merged(net):
                torch.testing.assert_close(net(x), y)
            detach(net)
            torch.testing.assert_close(net(x), base)


class TestAttachIsAllOrNothing:
    def test_when_it_fails_half_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.LSTM(6, 4), nn.Linear(4, 3))
        before, classes, parameters = state(net), [type(layer) for layer in net], list(net.parameters())
        svd, calls = torch.linalg.svd, []

        def failing(*args: object, **kwargs: object) -> object:
            calls.append(args)
            if len(calls) == 3:
                raise RuntimeError("linalg.svd: the algorithm failed to converge")
            return svd(*args, **kwargs)

        monkeypatch.setattr(torch.linalg, "svd", failing)
        with pytest.raises(RuntimeError, match="failed to converge"):
            attach(net, LoRAConfig(rank=2, init="pissa", modules_to_save=["1"]))
        assert [type(layer) for layer in net] == classes
        assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
        assert same(state(net), before)
        assert all(parameter.requires_grad for parameter in net.parameters())
        assert not is_adapted(net)
        calls.append(None)
        assert len(attach(net, LoRAConfig(rank=2, init="pissa"))) == 4
        detach(net)

    def test_beside_another_adapter_that_one_stays_in_use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        net, x = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)), torch.randn(2, 8)
        attach(net, LoRAConfig(rank=1), name="a")
        stir(net)
        y = net(x)

        def failing(*args: object, **kwargs: object) -> None:
            raise RuntimeError("no")

        monkeypatch.setattr(torch.linalg, "svd", failing)
        with pytest.raises(RuntimeError, match="no"):
            attach(net, LoRAConfig(rank=2, init="pissa"), name="b")
        assert adapter_names(net) == ["a"]
        assert torch.equal(net(x), y)

    def test_a_weight_in_float8_is_refused_by_name(self) -> None:
        net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
        net[1].weight = nn.Parameter(net[1].weight.to(torch.float8_e4m3fn), requires_grad=False)
        with pytest.raises(ValueError, match=r"Layer '1' has a weight of torch.float8_e4m3fn"):
            attach(net, LoRAConfig(rank=2))
        assert type(net[0]) is nn.Linear


class TestRanksAboveALayers:
    def test_are_lowered_and_said(self, caplog: pytest.LogCaptureFixture) -> None:
        net = nn.ModuleDict(
            {"body": nn.Linear(32, 32), "head": nn.Linear(32, 10), "pre": nn.ModuleDict({"head": nn.Linear(32, 32)})}
        )
        with caplog.at_level(logging.WARNING):
            attach(net, LoRAConfig(rank=16))
        assert "'head' has 10 instead of 16" in caplog.text
        ranks = {each.name: (each.rank, each.adapter.scaling) for each in adapted_weights(net)}
        assert ranks == {"body": (16, 1.0), "head": (10, 1.0), "pre.head": (16, 1.0)}

    @pytest.mark.parametrize("pattern", ["head", "pre.head", r".*head"])
    def test_also_those_of_a_pattern(self, pattern: str) -> None:
        net = nn.ModuleDict({"body": nn.Linear(32, 32), "pre": nn.ModuleDict({"head": nn.Linear(32, 10)})})
        attach(net, LoRAConfig(rank=4, rank_pattern={pattern: 16}))
        ranks = {each.name: each.rank for each in adapted_weights(net)}
        assert ranks == {"body": 4, "pre.head": 10}

    def test_peft_reads_the_same_ranks(self, tmp_path: Path) -> None:
        peft = pytest.importorskip("peft")
        base, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)), torch.randn(3, 32)
        net = copy.deepcopy(base)
        attach(net, LoRAConfig(rank=16, alpha=32))
        stir(net)
        save_adapter(net, tmp_path)
        torch.testing.assert_close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), net(x))
        again = copy.deepcopy(base)
        load_adapter(again, tmp_path)
        assert torch.equal(again(x), net(x))

    def test_a_bypass_is_one_of_them(self) -> None:
        net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        attach(net, LoRAConfig(rank=8, target_modules=[], bypass=(12, 2)))
        assert {each.name: each.rank for each in adapted_weights(net)}[""] == 2


class TestTransformersModels:
    """What `target_modules="all"` means in models of the transformers library."""

    @pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "falcon"])
    def test_all_is_the_set_of_peft(self, name: str, caplog: pytest.LogCaptureFixture) -> None:
        net = make(name)
        expected = all_linear(net)
        assert sorted(attach(net, LoRAConfig(rank=2, dropout=0.1))) == expected
        assert "excludes" in caplog.text

    def test_other_layers_and_the_head_are_adapted_where_they_are_named(self) -> None:
        net = make("llama")
        names = ["embed_tokens", "lm_head"]
        assert attach(net, LoRAConfig(rank=2, target_modules=names)) == ["model.embed_tokens", "lm_head"]
        detach(net)
        found = attach(net, LoRAConfig(rank=2, target_parameters=["lm_head.weight"]))
        assert "lm_head.weight" in found

    def test_layers_beside_such_a_model_are_adapted_as_ever(self) -> None:
        net = nn.ModuleDict({"encoder": make("bert"), "table": nn.Embedding(3, 4), "head": nn.Linear(32, 3)})
        names = attach(net, LoRAConfig(rank=2))
        assert {"table", "head"} <= set(names)
        assert not any("embeddings" in name for name in names)
