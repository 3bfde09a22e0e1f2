"""Every kind of adapted layer against a dense oracle: a copy of the plain layer with its weight replaced by W + ΔW."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.func import functional_call

from lora_lightning import LoRAConfig
from lora_lightning.lora import (
    AdaptedWeight,
    adapted_weights,
    adapter_parameters,
    attach,
    base_fingerprint,
    detach,
    disabled,
    merge,
    merged,
)
from lora_lightning.lora.sharding import full
from tests.helpers import stir

F64 = torch.float64


def delta(site: AdaptedWeight) -> Tensor:
    """ΔW by the definition, element by element, from the parameters alone."""
    update, weight = site.adapter, site.weight
    if site.layout.experts:
        return torch.einsum("ore,rei->eoi", site.factors[1], site.factors[0]) * update.scaling
    down, up = site.factors
    change = torch.einsum("or,ri->oi", up, down)
    if "lora_A_initial" in update._buffers:
        change = change - torch.einsum("or,ri->oi", update.lora_B_initial, update.lora_A_initial)
    change = change * update.scaling
    transposed = type(site.layer).__name__ in ("LoRAEmbedding", "LoRAConv1D")
    return (change.t() if transposed else change).reshape(weight.shape)


def dense_weight(site: AdaptedWeight) -> Tensor:
    full = site.weight + delta(site)
    magnitude = site.adapter._parameters.get("lora_magnitude_vector")
    if magnitude is None:
        return full
    transposed = type(site.layer).__name__ in ("LoRAEmbedding", "LoRAConv1D")
    rows = (full.t() if transposed else full).flatten(1)
    rows = rows * (magnitude.view(-1) / rows.detach().norm(dim=1))[:, None]
    return (rows.t() if transposed else rows).reshape(full.shape)


def check(plain: nn.Module, inputs: tuple[Any, ...], config: LoRAConfig, *, tolerance: float = 1e-9) -> None:
    """Everything that an adapted layer promises, on one layer and one input."""

    def first(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    plain.eval()
    before, oracle = copy.deepcopy(plain.state_dict()), copy.deepcopy(plain)
    expected = first(plain(*inputs))
    # Transformer layers go another way where no gradient is asked for, and it rounds otherwise.
    expected_without_grad = first(plain.requires_grad_(False)(*inputs))
    plain.requires_grad_(True)
    attach(plain, config)
    assert torch.equal(first(plain(*inputs)), expected), "a fresh adapter changes a bit"
    with torch.no_grad():
        assert torch.equal(first(plain(*inputs)), expected_without_grad), "a fresh adapter changes a bit"
    stir(plain, 0.3)
    found = adapted_weights(plain)
    dense = {f"{site.layer_name}.{site.parameter}".lstrip("."): dense_weight(site) for site in found}
    y, target = first(plain(*inputs)), first(functional_call(oracle, dense, inputs))
    torch.testing.assert_close(y, target, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(y, expected)
    upstream = torch.randn_like(y)
    parameters = adapter_parameters(plain)
    torch.testing.assert_close(
        torch.autograd.grad(y, parameters, upstream),
        torch.autograd.grad(target, parameters, upstream),
        rtol=tolerance,
        atol=tolerance,
    )
    with torch.no_grad():
        torch.testing.assert_close(first(plain(*inputs)), target, rtol=tolerance, atol=tolerance)
    with disabled(plain), torch.no_grad():
        assert torch.equal(first(plain(*inputs)), expected_without_grad)
    with merged(plain):
        torch.testing.assert_close(first(plain(*inputs)), target, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in before.items()), "unmerged is not bitwise"
    other = copy.deepcopy(plain)
    torch.testing.assert_close(first(other(*inputs)), y, rtol=tolerance, atol=tolerance)
    merge(other)
    torch.testing.assert_close(first(other(*inputs)), target, rtol=tolerance, atol=tolerance)
    assert type(other) is type(oracle)
    detach(plain)
    assert torch.equal(first(plain(*inputs)), expected)
    assert plain.state_dict().keys() == before.keys()
    assert not any("lora" in name for layer in plain.modules() for name in vars(layer))


VARIANTS = st.fixed_dictionaries(
    {
        "alpha": st.floats(0.5, 4),
        "use_rslora": st.booleans(),
        "use_dora": st.booleans(),
        "init": st.sampled_from(["kaiming", "gaussian", "pissa"]),
    }
)


@settings(deadline=None, max_examples=50)
@given(batch=st.lists(st.integers(1, 3), max_size=3), rank=st.integers(1, 4), bias=st.booleans(), variant=VARIANTS)
def test_linear(batch: list[int], rank: int, bias: bool, variant: dict[str, Any]) -> None:
    layer = nn.Linear(5, 4, bias=bias, dtype=F64)
    check(layer, (torch.randn(*batch, 5, dtype=F64),), LoRAConfig(rank=rank, **variant))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[Tensor, ...]]:
    dimensions = draw(st.sampled_from([1, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels, out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dimensions))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dimensions))
    mode = draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"]))
    same = draw(st.booleans())
    padding = "same" if same else tuple(draw(st.integers(0, 2)) for _ in range(dimensions))
    stride = 1 if same else tuple(draw(st.integers(1, 3)) for _ in range(dimensions))
    layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions](
        channels, out, kernel, stride, padding, dilation, groups, draw(st.booleans()), mode, dtype=F64
    )
    size = [draw(st.integers(5, 7)) for _ in range(dimensions)]
    batch = draw(st.sampled_from([(), (2,)]))
    return layer, (torch.randn(*batch, channels, *size, dtype=F64),)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # slower, PyTorch says; no matter
@settings(deadline=None, max_examples=120)
@given(case=convolutions(), rank=st.integers(1, 3), variant=VARIANTS)
def test_convolutions(case: tuple[nn.Module, tuple[Tensor, ...]], rank: int, variant: dict[str, Any]) -> None:
    layer, inputs = case
    rank = min(rank, layer.weight.shape[0], layer.weight[0].numel())
    check(layer, inputs, LoRAConfig(rank=rank, **variant))


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(1, 4), max_size=2),
    rank=st.integers(1, 4),
    padding_idx=st.sampled_from([None, 0, -1]),
    variant=VARIANTS,
)
def test_embedding(shape: list[int], rank: int, padding_idx: int | None, variant: dict[str, Any]) -> None:
    layer = nn.Embedding(7, 4, padding_idx=padding_idx, dtype=F64)
    check(layer, (torch.randint(1, 6, shape),), LoRAConfig(rank=rank, **variant))


def test_the_padding_vector_of_an_embedding_stays_while_the_others_train() -> None:
    for init in ("kaiming", "gaussian", "pissa"):
        layer = nn.Embedding(7, 4, padding_idx=2, dtype=F64)
        with torch.no_grad():
            layer.weight[2] = 3.0
        attach(layer, LoRAConfig(rank=2, init=init))
        before = layer(torch.arange(7)).detach()
        optimizer = torch.optim.Adam(adapter_parameters(layer), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.arange(7)).square().sum().backward()
            optimizer.step()
        after = layer(torch.arange(7))
        assert torch.equal(after[2], before[2])
        assert all((after[row] != before[row]).any() for row in range(7) if row != 2)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support on cpu")
def test_distributed_adapters_of_an_embedding_are_drawn_as_others_and_leave_the_padding_alone(mesh: DeviceMesh) -> None:
    layer = nn.Embedding(200, 4, padding_idx=2)
    attach(layer, LoRAConfig(rank=2))
    (found,) = adapted_weights(layer)
    found.adapter.replicate(mesh)
    found.adapter.reset_parameters()
    a = full(found.adapter.lora_A)
    assert a[:, 2].eq(0).all()
    assert 0.9 < a.abs().max() <= 1


@settings(deadline=None, max_examples=20)
@given(batch=st.lists(st.integers(1, 3), min_size=1, max_size=2), rank=st.integers(1, 4), variant=VARIANTS)
def test_the_transposed_linear_of_transformers(batch: list[int], rank: int, variant: dict[str, Any]) -> None:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(4, 5).double()
    check(layer, (torch.randn(*batch, 5, dtype=F64),), LoRAConfig(rank=rank, **variant))


@settings(deadline=None, max_examples=40)
@given(
    separate=st.booleans(),
    batch_first=st.booleans(),
    bias=st.booleans(),
    need_weights=st.booleans(),
    add_bias_kv=st.booleans(),
    rank=st.integers(1, 3),
    variant=VARIANTS,
)
def test_attention(
    separate: bool,
    batch_first: bool,
    bias: bool,
    need_weights: bool,
    add_bias_kv: bool,
    rank: int,
    variant: dict[str, Any],
) -> None:
    sizes = {"kdim": 3, "vdim": 5} if separate else {}
    layer = nn.MultiheadAttention(8, 2, bias=bias, add_bias_kv=add_bias_kv, batch_first=batch_first, dtype=F64, **sizes)
    inputs = [torch.randn(2, 3, size, dtype=F64) for size in (8, sizes.get("kdim", 8), sizes.get("vdim", 8))]
    if not separate:
        inputs = [inputs[0]] * 3  # self-attention, which has a fast path
    check(layer, (*inputs, None, need_weights), LoRAConfig(rank=rank, **variant))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"init": "pissa"}])
def test_transformer_layers(norm_first: bool, activation: str, variant: dict[str, Any]) -> None:
    settings = {"norm_first": norm_first, "activation": activation, "batch_first": True, "dtype": F64}
    x = torch.randn(2, 3, 8, dtype=F64)
    check(nn.TransformerEncoderLayer(8, 2, 16, **settings), (x,), LoRAConfig(rank=2, **variant))
    check(nn.TransformerDecoderLayer(8, 2, 16, **settings), (x, x + 1), LoRAConfig(rank=2, **variant))
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, **settings), 2, enable_nested_tensor=False)
    check(encoder, (x,), LoRAConfig(rank=2, **variant))


def test_the_fast_path_of_a_transformer_layer_is_still_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    attach(layer, LoRAConfig(rank=2))
    stir(layer, 0.3)
    x, calls = torch.randn(2, 3, 8), []
    slow = layer(x)
    fast_path = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a, **k: calls.append(1) or fast_path(*a, **k))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), slow)
    assert calls == [1]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # PyTorch's own use of them
def test_padding_masks_go_through_the_nested_fast_path() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    attach(encoder, LoRAConfig(rank=2))
    stir(encoder, 0.3)
    x, mask = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    slow = encoder(x, src_key_padding_mask=mask)
    with torch.no_grad():
        fast = encoder(x, src_key_padding_mask=mask)
    torch.testing.assert_close(fast[~mask], slow[~mask])


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    projected=st.booleans(),
    rank=st.integers(1, 2),
    variant=VARIANTS,
)
def test_recurrent_layers(
    kind: Callable[..., nn.Module],
    layers: int,
    bidirectional: bool,
    bias: bool,
    projected: bool,
    rank: int,
    variant: dict[str, Any],
) -> None:
    extra = {"proj_size": 2} if projected and kind is nn.LSTM else {}
    layer = kind(3, 4, layers, bidirectional=bidirectional, bias=bias, dtype=F64, **extra)
    check(layer, (torch.randn(5, 2, 3, dtype=F64),), LoRAConfig(rank=rank, **variant))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells(kind: Callable[..., nn.Module]) -> None:
    check(kind(3, 4, dtype=F64), (torch.randn(2, 3, dtype=F64),), LoRAConfig(rank=2))


class Bilinear(nn.Module):
    """A module of a user's own, with parameters that belong to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(4, 6, dtype=F64))
        self.stack = nn.Parameter(torch.randn(3, 4, 5, dtype=F64))
        self.bias = nn.Parameter(torch.randn(4, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,oi,sok->bsk", x, self.inner, self.stack) + (self.bias @ self.inner).sum()


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"init": "pissa"}, {"rank_pattern": {"stack": 3}}])
def test_any_parameter_by_name(variant: dict[str, Any]) -> None:
    plain = "use_dora" not in variant and "init" not in variant  # matrices of experts take plain LoRA alone
    names = ["inner", "stack"] if plain else ["inner"]
    config = LoRAConfig(rank=2, target_modules=[], target_parameters=names, **variant)
    check(Bilinear(), (torch.randn(3, 6, dtype=F64),), config)
    check(nn.Sequential(Bilinear()), (torch.randn(3, 6, dtype=F64),), config)


class Standardised(nn.Conv2d):
    """Computes with its weight in its own way: what timm and others call a weight-standardised convolution."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        mean, std = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (weight - mean) / std, self.bias)


def test_a_subclass_with_a_forward_of_its_own_finds_the_weight_in_effect() -> None:
    check(Standardised(3, 4, 3, dtype=F64), (torch.randn(2, 3, 5, 5, dtype=F64),), LoRAConfig(rank=2), tolerance=1e-7)


class Reader(nn.Module):
    """Reads a layer's weight instead of calling the layer, as Swin, BEiT and tied decoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, dtype=F64)
        self.qkv = nn.Linear(4, 12, dtype=F64)

    def forward(self, index: Tensor) -> Tensor:
        h = self.embed(index)
        qkv = nn.functional.linear(h, self.qkv.weight, self.qkv.bias)
        return nn.functional.linear(qkv[..., :4] * qkv[..., 4:8] + qkv[..., 8:], self.embed.weight)


def test_a_weight_that_other_code_reads_is_the_one_in_effect() -> None:
    check(Reader(), (torch.randint(7, (2, 3)),), LoRAConfig(rank=2))


def test_a_bypass_adds_s_b_a_x_to_any_module() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 16, 10)).double()
    x = torch.randn(5, 3, 6, 6, dtype=F64)
    digest, expected = base_fingerprint(net), net.eval()(x)
    assert attach(net, LoRAConfig(rank=2, alpha=6, target_modules=[], bypass=(108, 10))) == [""]
    assert sum(parameter.numel() for parameter in adapter_parameters(net)) == 108 * 2 + 2 * 10
    assert torch.equal(net(x), expected)
    stir(net, 0.3)
    torch.testing.assert_close(
        net(x), expected + 3 * x.flatten(1) @ net.lora_bypass.default.lora_A.t() @ net.lora_bypass.default.lora_B.t()
    )
    with disabled(net):
        assert torch.equal(net(x), expected)
    with pytest.raises(ValueError, match=r"bypass around this .* cannot be merged"):
        merge(net)
    detach(net)
    assert torch.equal(net(x), expected)
    assert base_fingerprint(net) == digest


def test_a_bypass_of_the_wrong_size_says_which_sizes_it_met() -> None:
    net = nn.Flatten()
    attach(net, LoRAConfig(rank=2, target_modules=[], bypass=(12, 10)))
    with pytest.raises(ValueError, match=r"bypass=\(12, 10\) does not fit this module: .* have the sizes \(12, 12\)"):
        net(torch.randn(5, 3, 4))


class Colliding(nn.Linear):
    """A user's own layer, and network, with names that an adapter might use too."""

    def __init__(self) -> None:
        super().__init__(5, 4, dtype=F64)
        self.rank, self.base, self.matrix, self.delta, self.factors, self.scaling, self.dropout = range(7)


def test_no_name_of_a_users_class_is_hidden() -> None:
    layer = Colliding()
    attach(layer, LoRAConfig(rank=2))
    assert [layer.rank, layer.base, layer.matrix, layer.delta, layer.factors, layer.scaling, layer.dropout] == [
        *range(7)
    ]
    for plain in (nn.Linear(4, 3), nn.Conv2d(2, 3, 3), nn.Embedding(4, 3), nn.LSTM(3, 4), nn.MultiheadAttention(4, 2)):
        before = set(dir(plain))
        attach(plain, LoRAConfig(rank=1))
        assert all(name.startswith(("lora_", "_lora_")) for name in set(dir(plain)) - before)
