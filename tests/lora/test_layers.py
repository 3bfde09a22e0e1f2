"""An adapted linear layer against a dense oracle: a plain layer with the weight W + s B A."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora import LoRAConfig, adapted_weights, attach, disabled, merge
from lora_lightning.lora.fused import _dropout, _dropout_again
from lora_lightning.lora.layers import CalledKind
from lora_lightning.lora.other_layers import ScaledEmbeddingKind
from lora_lightning.lora.registry import kind_of
from tests.helpers import stir

SHAPES = st.lists(st.integers(0, 3), max_size=3)


def adapted_linear(
    rank: int = 2, alpha: float = 3.0, *, bias: bool = True, dtype: torch.dtype = torch.float64, **config: object
) -> nn.Linear:
    """A layer of 5 inputs and 4 outputs whose adapter does something."""
    layer = nn.Linear(5, 4, bias=bias, dtype=dtype)
    attach(layer, LoRAConfig(rank=rank, alpha=alpha, **config))
    nn.init.normal_(layer.lora_weight.default.lora_B)
    return layer


def base(layer: nn.Linear) -> Tensor:
    """The frozen weight, which `layer.weight` is not."""
    return layer.state_dict()["weight"]


def plain_operations(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer without the hand-written backward pass."""
    kind, adapters = layer.lora_weight.kind, layer.lora_weight.in_effect.adapters
    return CalledKind.adapted(kind, layer, base(layer), x, adapters)


def dense(layer: nn.Linear, x: Tensor) -> Tensor:
    weight = (
        base(layer)
        + layer.lora_weight.default.scaling * layer.lora_weight.default.lora_B @ layer.lora_weight.default.lora_A
    )
    return F.linear(x, weight, layer.bias)


@settings(deadline=None, max_examples=60)
@given(
    batch=SHAPES,
    rank=st.integers(1, 4),
    alpha=st.floats(0.1, 10),
    bias=st.booleans(),
    needs_input_gradient=st.booleans(),
)
def test_output_and_gradients_are_those_of_the_dense_layer(
    batch: list[int], rank: int, alpha: float, bias: bool, needs_input_gradient: bool
) -> None:
    layer = adapted_linear(rank, alpha, bias=bias)
    x = torch.randn(*batch, 5, dtype=torch.float64, requires_grad=needs_input_gradient)
    inputs = [
        layer.lora_weight.default.lora_A,
        layer.lora_weight.default.lora_B,
        *([x] if needs_input_gradient else []),
    ]
    y, expected = layer(x), dense(layer, x)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("grad", [True, False])
def test_a_fresh_adapter_changes_no_bit(bias: bool, shape: tuple[int, ...], grad: bool) -> None:
    layer = nn.Linear(5, 4, bias=bias)
    x = torch.randn(shape)
    before = layer(x)
    attach(layer, LoRAConfig(rank=2))
    with torch.set_grad_enabled(grad):
        assert torch.equal(layer(x), before)


def test_second_derivatives_are_right() -> None:
    layer = adapted_linear()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return torch.func.functional_call(
            layer, {"lora_weight.default.lora_A": down, "lora_weight.default.lora_B": up}, (x,)
        )

    assert torch.autograd.gradcheck(function, (x, layer.lora_weight.default.lora_A, layer.lora_weight.default.lora_B))
    assert torch.autograd.gradgradcheck(
        function, (x, layer.lora_weight.default.lora_A, layer.lora_weight.default.lora_B)
    )


def test_second_derivatives_reach_adapters_that_are_wider_than_the_base() -> None:
    layer = adapted_linear(dtype=torch.bfloat16)
    x = torch.randn(2, 3, 5, dtype=torch.bfloat16, requires_grad=True)
    inputs = (x, layer.lora_weight.default.lora_A, layer.lora_weight.default.lora_B)
    found = []
    for forward in (layer, partial(plain_operations, layer)):
        gradients = torch.autograd.grad(forward(x).float().square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(each.float().square().sum() for each in gradients), inputs))
    for fused, plain in zip(*found, strict=True):
        assert fused.dtype == plain.dtype
        assert plain.any()
        torch.testing.assert_close(fused, plain, rtol=0.1, atol=0.05 * float(plain.abs().max()))


def test_function_transforms_see_the_adapter() -> None:
    layer = adapted_linear()
    x = torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(layer)(x), dense(layer, x))
    jacobian = torch.func.jacrev(layer)(x[0])
    torch.testing.assert_close(jacobian, base(layer) + layer.lora_weight.default.delta_weight(base(layer)))


# https://docs.pytorch.org/docs/2.9/jit.html: deprecated since 2.9
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore:.*torch.jit.trace:FutureWarning")
def test_an_adapted_layer_is_traced_with_its_adapter() -> None:
    layer = adapted_linear()
    x = torch.randn(4, 5, dtype=torch.float64)
    traced = torch.jit.trace(layer, x)  # runs it with gradients and without, and compares
    torch.testing.assert_close(traced(x), layer(x))


def test_a_base_of_low_precision_keeps_its_dtype_beside_a_float32_adapter() -> None:
    layer = adapted_linear(dtype=torch.bfloat16)
    assert layer.lora_weight.default.lora_A.dtype == layer.lora_weight.default.lora_B.dtype == torch.float32
    x = torch.randn(3, 5, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = F.linear(
        x.float(), base(layer).float() + layer.lora_weight.default.delta_weight(base(layer)), layer.bias.float()
    )
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("grad", [True, False])
def test_autocast_runs_both_paths_in_low_precision(grad: bool) -> None:
    layer = adapted_linear(dtype=torch.float32)
    x = torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), dense(layer, x), rtol=0.05, atol=0.05)


def test_dropout_touches_the_adapter_path_alone_and_only_in_training() -> None:
    layer = adapted_linear(dropout=0.5)
    x = torch.randn(64, 5, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), dense(layer, x))
    layer.train()
    with disabled(layer):
        assert torch.equal(layer(x), F.linear(x, base(layer), layer.bias))
    nn.init.zeros_(layer.lora_weight.default.lora_B)
    assert torch.equal(layer(x), F.linear(x, base(layer), layer.bias))


@pytest.mark.parametrize("transposed", [False, True])
def test_dropout_draws_the_same_numbers_as_pytorchs_and_has_its_gradients(transposed: bool) -> None:
    layer = adapted_linear(dropout=0.3)
    values = torch.randn(2, 5, 7, dtype=torch.float64).mT if transposed else torch.randn(2, 7, 5, dtype=torch.float64)
    found = []
    for forward in (layer, partial(plain_operations, layer)):
        torch.manual_seed(3)
        x = values.detach().requires_grad_()
        output = forward(x)
        gradients = torch.autograd.grad(
            output.square().sum(), (x, layer.lora_weight.default.lora_A, layer.lora_weight.default.lora_B)
        )
        found.append((output, *gradients, torch.get_rng_state()))
    for fused, plain in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain)
    assert torch.equal(found[0][0], found[1][0])

    def function(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        torch.manual_seed(3)
        return torch.func.functional_call(
            layer, {"lora_weight.default.lora_A": down, "lora_weight.default.lora_B": up}, (x,)
        )

    assert torch.autograd.gradgradcheck(
        function, (x, layer.lora_weight.default.lora_A, layer.lora_weight.default.lora_B)
    )


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.013])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dropout_is_that_of_pytorch_bit_for_bit(dtype: torch.dtype, rate: float) -> None:
    for x in (torch.randn(9, 33).to(dtype), torch.randn(3, 5, 7).to(dtype).mT, torch.randn(4, 6, 8).to(dtype)[:, ::2]):
        gradient = torch.randn_like(x)
        torch.manual_seed(3)
        expected = F.dropout(x.requires_grad_(), rate)
        (through,) = torch.autograd.grad(expected, x, gradient)
        torch.manual_seed(3)
        found, mask = _dropout(x.detach(), rate)
        again, backward = _dropout_again(x.detach(), gradient.clone(), mask, rate)
        assert torch.equal(found, expected)
        assert torch.equal(again, expected)
        assert backward is not None
        assert torch.equal(backward, through)


def test_layers_with_one_input_keep_it_once_for_the_backward_pass_also_with_dropout() -> None:
    layers = [adapted_linear(dropout=0.1, dtype=torch.float32) for _ in range(3)]
    x = torch.randn(1000, 5).requires_grad_()
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        outputs = [layer(x) for layer in layers]
    mask, low, weights = x.numel(), 1000 * 2 * 4, 4 * (5 * 4 + 2 * 5 + 4 * 2)
    assert sum(kept.values()) <= 4 * x.numel() + 3 * (mask + low + weights)
    assert len(outputs) == 3


def test_gaussian_has_the_seed_notebooks_standard_deviation_at_rank_1() -> None:
    layer = nn.Linear(20_000, 1)
    attach(layer, LoRAConfig(rank=1, init="gaussian"))
    assert layer.lora_weight.default.lora_A.std().item() == pytest.approx(1, abs=0.02)
    assert not layer.lora_weight.default.lora_B.any()


def test_kaiming_is_uniform_within_one_over_the_root_of_the_inputs() -> None:
    layer = nn.Linear(400, 8)
    attach(layer, LoRAConfig(rank=8))
    bound = 400**-0.5
    assert layer.lora_weight.default.lora_A.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert layer.lora_weight.default.lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_a_seed_gives_the_same_adapter_whatever_the_dtype_of_the_base() -> None:
    adapters = []
    for dtype in (torch.float32, torch.bfloat16):
        layer = nn.Linear(5, 4, dtype=dtype)
        torch.manual_seed(7)
        attach(layer, LoRAConfig(rank=2))
        adapters.append(copy.deepcopy(layer.lora_weight.default.lora_A))
    assert torch.equal(*adapters)


class ScaledRows(nn.Embedding):
    """Multiplies its rows, as embeddings of the transformers library do."""

    embed_scale = 4.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class BufferedScale(nn.Embedding):
    """Has its scale in a buffer, as Gemma's embedding does."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self.register_buffer("embed_scale", torch.tensor(4.0), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale.to(self.weight.dtype)


class ScaledAndShifted(ScaledRows):
    """Has a scale, and does something else as well."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class WithAnotherRow(ScaledRows):
    """Has a row of its own for one of the tokens, as the embedding of T5Gemma 2 does."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self.row = nn.Parameter(torch.ones(width))

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return torch.where((input == 7)[..., None], self.row, output)


@pytest.mark.parametrize(
    ("cls", "is_scaled"),
    [(ScaledRows, True), (BufferedScale, True), (ScaledAndShifted, False), (WithAnotherRow, False)],
)
def test_a_scaled_embedding_is_known_by_what_it_computes(cls: type[nn.Embedding], is_scaled: bool) -> None:
    net = nn.Sequential(cls(10, 4))
    state = torch.get_rng_state()
    assert isinstance(kind_of(net[0]), ScaledEmbeddingKind) == is_scaled
    assert torch.equal(torch.get_rng_state(), state)
    ids = torch.arange(10)
    base = net(ids)
    attach(net, LoRAConfig(rank=2, target_modules=["0"]))
    assert torch.equal(net(ids), base)
    stir(net)
    adapted = net(ids)
    assert not torch.allclose(adapted, base)
    merge(net)
    torch.testing.assert_close(net(ids), adapted)


def test_second_adapters_of_a_scaled_embedding_are_like_the_first() -> None:
    net, ids = nn.Sequential(ScaledRows(10, 4)), torch.arange(10)
    attach(net, LoRAConfig(rank=2), name="first")
    attach(net, LoRAConfig(rank=2), name="second")
    assert adapted_weights(net, "second")[0].factors[0].shape == adapted_weights(net, "first")[0].factors[0].shape
    stir(net)
    adapted = net(ids)
    merge(net)
    torch.testing.assert_close(net(ids), adapted)
