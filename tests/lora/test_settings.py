"""Adapters in the settings that models are trained and shipped in."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_lightning import LoRAConfig, load_adapter, save_adapter
from lora_lightning.lora import (
    adapter_parameters,
    adapter_state_dict,
    attach,
    bare,
    base_fingerprint,
    detach,
    disabled,
    merge,
    merged,
)
from tests.helpers import stir


class Small(nn.Module):
    """One of each: a convolution, a norm layer, attention, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.head(self.encoder(x.flatten(2).mT).mean(1))


def adapted(config: LoRAConfig, net: nn.Module | None = None) -> nn.Module:
    net = Small() if net is None else net
    attach(net, config)
    with torch.no_grad():
        for parameter in adapter_parameters(net):
            parameter += 0.1 * torch.randn_like(parameter)
    return net


VARIANTS = {
    "plain": LoRAConfig(rank=2, alpha=3),
    "dora": LoRAConfig(rank=2, use_dora=True),
    "pissa": LoRAConfig(rank=2, init="pissa"),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def net(request: pytest.FixtureRequest) -> nn.Module:
    return adapted(request.param)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 6, 6)


def gradients(net: nn.Module, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.float().square().sum(), adapter_parameters(net)))


def test_autocast_to_bfloat16(net: nn.Module, x: Tensor) -> None:
    for mode in (True, False):
        net.train(mode)
        exact = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
            with disabled(net):
                base = net(x)
        assert y.dtype == base.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
        assert not torch.equal(y, base)
        assert all(gradient.dtype == torch.float32 and gradient.any() for gradient in gradients(net, y))


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_base_in_bfloat16_under_float32_adapters(config: LoRAConfig, x: Tensor) -> None:
    net = adapted(config, Small().bfloat16())
    assert all(parameter.dtype == torch.float32 for parameter in adapter_parameters(net))
    exact = copy.deepcopy(net).float()
    for mode in (True, False):
        net.train(mode)
        y = net(x.bfloat16())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), exact.train(mode)(x), rtol=0.05, atol=0.05)
        assert all(gradient.dtype == torch.float32 and gradient.any() for gradient in gradients(net, y))
        with torch.no_grad():
            torch.testing.assert_close(net(x.bfloat16()), y, rtol=0.05, atol=0.05)
    digest = base_fingerprint(net)
    with merged(net):
        torch.testing.assert_close(net(x.bfloat16()).float(), exact(x), rtol=0.05, atol=0.05)
    assert base_fingerprint(net) == digest


def test_training_over_a_bfloat16_base_keeps_no_float32_copy_of_activations() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).bfloat16()
    attach(net, LoRAConfig(rank=2))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        net(torch.randn(64, 16).bfloat16()).float().square().sum().backward()
    activations = [each for each in kept if each.dim() == 2 and len(each) == 64 and each.shape[1] == 16]
    assert activations
    assert {each.dtype for each in activations} == {torch.bfloat16}


def test_channels_last(net: nn.Module, x: Tensor) -> None:
    y = net.eval()(x)
    net.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    assert net.conv(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x), y)
    digest = base_fingerprint(net)
    with merged(net):
        torch.testing.assert_close(net(x), y)
    assert base_fingerprint(net) == digest


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the compiler's own modules
@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor"))]
)
def test_compiled_without_graph_breaks_and_switched_without_compiling_again(
    net: nn.Module, x: Tensor, backend: str
) -> None:
    torch.compiler.reset()
    net.eval()
    if (
        backend == "inductor"
    ):  # fails on a plain encoder without a gradient: https://github.com/pytorch/pytorch/issues/193966
        x.requires_grad_()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    expected, expected_gradients = net(x), gradients(net, net(x))
    with disabled(net):
        base = net(x)
    y = compiled(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(net, y), expected_gradients)
    y = compiled(x)
    with disabled(net):  # each state is compiled once
        compiled(x)
    with merged(net):
        compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            with disabled(net):
                torch.testing.assert_close(compiled(x), base)
            torch.testing.assert_close(compiled(x), expected)
        with merged(net):
            torch.testing.assert_close(compiled(x), expected)
    # What was computed before switching still has its gradients.
    torch.testing.assert_close(gradients(net, y), expected_gradients)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the compiler's own modules
def test_compiled_block_by_block_all_blocks_share_what_is_compiled_for_the_first() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(self.norm(x)).relu())

    torch.compiler.reset()
    blocks = nn.Sequential(*(Block() for _ in range(3)))
    attach(blocks, LoRAConfig(rank=2))
    stir(blocks)
    x = torch.randn(5, 4, 8, requires_grad=True)
    expected = blocks(x)
    for block in blocks:
        block.compile(backend="eager", fullgraph=True)
    blocks[0](x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(blocks(x), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), "torch.save"])
def test_copies_and_pickles(net: nn.Module, x: Tensor, copied: Callable[[nn.Module], nn.Module] | str) -> None:
    net.eval()
    if callable(copied):
        other = copied(net)
    else:
        torch.save(net, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(other(x), net(x))
    with torch.no_grad():
        other.head.lora_weight.default.lora_B.zero_()
        assert not torch.equal(other(x), net(x))
    detach(other)
    assert not any("lora" in key for key in other.state_dict())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(net: nn.Module, x: Tensor, use_reentrant: bool) -> None:
    net.train()
    expected = gradients(net, net(x))
    # The reentrant kind has gradients for an input that asks for them alone.
    y = checkpoint(net, x.clone().requires_grad_(), use_reentrant=use_reentrant)
    y.square().sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in adapter_parameters(net)], expected)


def test_moving_and_converting_takes_the_adapters_along(net: nn.Module, x: Tensor) -> None:
    y = net.eval().double()(x.double())
    torch.testing.assert_close(net.float()(x).double(), y, rtol=1e-4, atol=1e-5)
    on_meta = copy.deepcopy(net).to("meta").train()
    assert on_meta(x.to("meta")).shape == y.shape


def test_tied_weights_keep_their_tie_and_each_its_own_adapter() -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    net["head"].weight = net["embed"].weight
    attach(net, LoRAConfig(rank=2, target_modules=["head"]))
    nn.init.normal_(net["head"].lora_weight.default.lora_B)
    index, h = torch.arange(6), torch.randn(2, 4)
    torch.testing.assert_close(net["embed"](index), net["embed"].weight)
    assert not torch.allclose(net["head"](h), h @ net["embed"].weight.t())
    for verb in (merge, lambda module: merged(module).__enter__()):
        with pytest.raises(ValueError, match=r"weight of 'head' is shared \(embed.weight, head.weight\)"):
            verb(net)
    detach(net)
    assert net["head"].weight is net["embed"].weight


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the exporter's own modules
def test_the_merged_model_is_exported(net: nn.Module, x: Tensor) -> None:
    y = net.eval()(x)
    merge(net)
    program = torch.export.export(net, (x,))
    torch.testing.assert_close(program.module()(x), y)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of PyTorch's attention under vmap
def test_per_sample_gradients_by_function_transforms(x: Tensor) -> None:
    net = adapted(LoRAConfig(rank=2, target_modules=["conv", "head"])).eval()
    parameters = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(net, parameters, (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for index in range(len(x)):
        one: dict[str, Any] = torch.func.grad(loss)(parameters, x[index])
        for name, gradient in one.items():
            torch.testing.assert_close(each[name][index], gradient)


class TestQuantised:
    """A base of weights in int8, float8 or four bits, by torchao."""

    @pytest.fixture(params=["int8", "float8", "int4", "int8 with activations in int8"])
    def base(self, request: pytest.FixtureRequest) -> nn.Module:
        torchao = pytest.importorskip("torchao.quantization", reason="the extra torchao is not installed")
        net = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        config = {
            "int8": torchao.Int8WeightOnlyConfig,
            "float8": torchao.Float8WeightOnlyConfig,
            "int4": partial(torchao.IntxWeightOnlyConfig, weight_dtype=torch.int4),
            "int8 with activations in int8": torchao.Int8DynamicActivationInt8WeightConfig,
        }[request.param]
        torchao.quantize_(net, config())
        net.rounds_activations = "activations" in request.param
        return net

    @pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
    def test_adapters_train_over_it_and_merging_makes_it_dense(self, base: nn.Module, config: LoRAConfig) -> None:
        x, digest = torch.randn(5, 32), base_fingerprint(base)
        expected = base(x)
        attach(base, config)
        assert torch.equal(base(x), expected)
        optimizer = torch.optim.Adam(adapter_parameters(base), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            (base(x) - 1).square().sum().backward()
            optimizer.step()
        assert base_fingerprint(base) == digest
        adapted = base(x)
        assert (adapted - 1).square().sum() < (expected - 1).square().sum()
        with disabled(base):
            assert torch.equal(base(x), expected)
        near = {"rtol": 0.05, "atol": 0.05} if base.rounds_activations else {"rtol": 1e-4, "atol": 1e-4}
        with merged(base):
            torch.testing.assert_close(base(x), adapted, **near)
        assert base_fingerprint(base) == digest
        assert torch.equal(base(x), adapted)
        with pytest.warns(UserWarning, match=r"weights of 0, 2 were quantized and are dense after merging"):
            merge(base)
        assert type(base[0].weight) is nn.Parameter
        torch.testing.assert_close(base(x), adapted, **near)

    def test_a_folder_gives_the_same_answers_over_the_same_base(self, base: nn.Module, tmp_path: Path) -> None:
        other, x = copy.deepcopy(base), torch.randn(5, 32)
        attach(base, LoRAConfig(rank=2))
        stir(base)
        save_adapter(base, tmp_path)
        load_adapter(other, tmp_path)
        assert torch.equal(other(x), base(x))

    def test_a_base_is_quantized_under_its_adapters_while_they_are_set_aside(self) -> None:
        torchao = pytest.importorskip("torchao.quantization", reason="the extra torchao is not installed")
        net = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        first = copy.deepcopy(net)
        torchao.quantize_(first, torchao.Int8WeightOnlyConfig())
        attach(first, LoRAConfig(rank=2))
        attach(net, LoRAConfig(rank=2))
        stir(net)
        first.load_state_dict(adapter_state_dict(net), strict=False)
        with bare(net):
            torchao.quantize_(net, torchao.Int8WeightOnlyConfig())
        assert torch.equal(net(torch.ones(3, 32)), first(torch.ones(3, 32)))
