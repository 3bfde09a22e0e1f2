"""Biases that are trained beside adapters: those of the base (`bias`), and those of B (`lora_bias`)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lora_lightning import LoRAConfig
from lora_lightning.lora import (
    adapted_weights,
    adapter_parameters,
    adapter_state_dict,
    add_weighted_adapter,
    attach,
    bare,
    base_fingerprint,
    delete_adapter,
    detach,
    disabled,
    is_untrained,
    merge,
    merged,
    scale_adapter,
    scaled,
    set_adapter,
    verify_adapters,
)
from tests.helpers import stir


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, dtype=torch.float64)
        self.norm = nn.BatchNorm2d(4, dtype=torch.float64)
        self.inner = nn.Linear(16, 6, dtype=torch.float64)
        self.head = nn.Linear(6, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.norm(self.conv(x)).flatten(1)).relu())


@pytest.fixture
def net() -> Net:
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, 4, 4, dtype=torch.float64)


TARGETS = ["conv", "inner"]
BIASES = {
    "all": {"conv.bias", "norm.bias", "inner.bias", "head.bias"},
    "lora_only": {"conv.bias", "inner.bias"},
}


class TestBiasesOfTheBase:
    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    def test_they_are_trained_in_full_and_come_back_bitwise(self, net: Net, x: Tensor, bias: str) -> None:
        before = {key: value.clone() for key, value in net.state_dict().items()}
        y = net(x)
        attach(net, LoRAConfig(rank=2, target_modules=TARGETS, bias=bias))
        torch.testing.assert_close(net(x), y, rtol=0, atol=0)
        trained = {key for key, value in net.named_parameters() if value.requires_grad}
        assert {key for key in trained if "lora_" not in key} == BIASES[bias]
        assert {id(value) for value in adapter_parameters(net)} == {id(net.get_parameter(key)) for key in trained}
        assert trained == set(adapter_state_dict(net))
        digest = base_fingerprint(net)
        optimizer = torch.optim.SGD(adapter_parameters(net), lr=0.1)
        net.train()
        net(x).square().sum().backward()
        optimizer.step()
        net.eval()
        changed = {key for key, value in before.items() if not torch.equal(net.state_dict()[key], value)}
        assert changed == BIASES[bias]
        assert base_fingerprint(net) == digest
        adapted = net(x)
        with disabled(net):
            assert torch.equal(net(x), y)
        assert torch.equal(net(x), adapted)
        other = copy.deepcopy(net)
        merge(other)
        torch.testing.assert_close(other(x), adapted)
        detach(net)
        assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
        assert torch.equal(net(x), y)
        assert all(value.requires_grad for value in net.parameters())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6)])
    def test_the_gradient_of_a_bias_is_that_of_plain_operations(
        self, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        layer = nn.Linear(6, 4, dtype=dtype)
        attach(layer, LoRAConfig(rank=2, bias="lora_only", alpha=3))
        stir(layer)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        weights = torch.randn(*shape[:-1], 4, dtype=dtype)
        (layer(x) * weights).sum().backward()
        torch.testing.assert_close(layer.bias.grad, weights.flatten(0, -2).sum(0))

    def test_each_adapter_has_its_own(self, net: Net, x: Tensor) -> None:
        y = net(x)
        attach(net, LoRAConfig(rank=1, target_modules=TARGETS, bias="all"), "a")
        stir(net, 0.3)
        a = net(x)
        attach(net, LoRAConfig(rank=1, target_modules=["head"], bias="lora_only"), "b")
        torch.testing.assert_close(net(x), y)
        stir(net, 0.3)
        b = net(x)
        with pytest.raises(ValueError, match=r"'a', 'b' cannot be active together: .* head.bias in full"):
            set_adapter(net, ["a", "b"])
        set_adapter(net, "a")
        assert torch.equal(net(x), a)
        set_adapter(net, "b")
        assert torch.equal(net(x), b)

    def test_biases_of_different_layers_go_together(self, net: Net, x: Tensor) -> None:
        attach(net, LoRAConfig(rank=1, target_modules=["inner"], bias="lora_only"), "a")
        stir(net, 0.3)
        attach(net, LoRAConfig(rank=1, target_modules=["head"], bias="lora_only"), "b")
        stir(net, 0.3)
        set_adapter(net, ["a", "b"], trained="b")
        assert {key for key, value in net.named_parameters() if value.requires_grad and "lora_" not in key} == {
            "head.bias"
        }
        assert torch.equal(net.inner.bias, adapter_state_dict(net, "a")["inner.bias"])

    def test_beside_modules_that_are_trained_in_full(self, net: Net) -> None:
        attach(net, LoRAConfig(rank=1, target_modules=["inner"], modules_to_save=["head"], bias="all"))
        trained = {key for key, value in net.named_parameters() if value.requires_grad and "lora_" not in key}
        assert trained == {"head.weight", "head.bias", "conv.bias", "norm.bias", "inner.bias"}


class TestBiasOfB:
    CONFIG = LoRAConfig(rank=2, alpha=3, target_modules=TARGETS, lora_bias=True)

    def test_it_adds_to_the_bias_wherever_it_is_read(self, net: Net, x: Tensor) -> None:
        plain = copy.deepcopy(net)
        y = net(x)
        attach(net, self.CONFIG)
        assert torch.equal(net(x), y)
        assert is_untrained(net)
        with torch.no_grad():
            net.inner.lora_weight.default.lora_bias.normal_()
        assert not is_untrained(net)
        stir(net, 0.3)
        assert [key for key in adapter_state_dict(net) if key.endswith("lora_bias")] == [
            "conv.lora_weight.default.lora_bias",
            "inner.lora_weight.default.lora_bias",
        ]
        for layer in ("conv", "inner"):
            adapted, base = net.get_submodule(layer), plain.get_submodule(layer)
            c = adapted.lora_weight.default.lora_bias
            torch.testing.assert_close(adapted.bias, base.bias + 1.5 * c)
            with torch.no_grad():
                base.bias += 1.5 * c
                base.weight += adapted.lora_weight.default.delta_weight(base.weight)
        torch.testing.assert_close(net(x), plain(x))
        expected = torch.autograd.grad(plain(x).square().sum(), [plain.conv.bias, plain.inner.bias])
        net(x).square().sum().backward()
        for layer, gradient in zip(("conv", "inner"), expected, strict=True):
            torch.testing.assert_close(net.get_submodule(layer).lora_weight.default.lora_bias.grad, 1.5 * gradient)

    def test_it_goes_with_its_adapter(self, net: Net, x: Tensor) -> None:
        state, y = {key: value.clone() for key, value in net.state_dict().items()}, net(x)
        attach(net, self.CONFIG)
        stir(net, 0.3)
        adapted, digest = net(x), base_fingerprint(net)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(other(x), adapted)
        with disabled(net):
            assert torch.equal(net(x), y)
            assert torch.equal(net.inner.bias, state["inner.bias"])
        with bare(net):
            assert torch.equal(net(x), y)
        with scaled(net, 0):
            torch.testing.assert_close(net(x), y)
        with merged(net):
            torch.testing.assert_close(net(x), adapted)
            with disabled(net):
                assert torch.equal(net(x), y)
        assert torch.equal(net(x), adapted)
        assert base_fingerprint(net) == digest
        verify_adapters(net, x)
        with pytest.raises(RuntimeError, match="'bias' of this Linear has adapters and is for reading only"):
            net.inner.bias = nn.Parameter(torch.zeros(6))
        other = copy.deepcopy(net)
        merge(other)
        torch.testing.assert_close(other(x), adapted)
        assert other.state_dict().keys() == state.keys()
        attach(net, LoRAConfig(rank=1, target_modules=TARGETS), "plain")
        assert torch.equal(net.inner.bias, state["inner.bias"])
        set_adapter(net, ["plain", "default"])
        torch.testing.assert_close(net(x), adapted)
        add_weighted_adapter(net, {"default": 1.0, "plain": 1.0}, "sum")
        torch.testing.assert_close(net(x), adapted)
        set_adapter(net, "default")
        scale_adapter(net, 0.5)
        delete_adapter(net, "sum")
        delete_adapter(net, "default")
        assert torch.equal(net(x), y)
        net.inner.bias = nn.Parameter(torch.zeros(6, dtype=torch.float64))  # no adapter adds to it any more
        net.load_state_dict(state, strict=False)
        detach(net)
        assert torch.equal(net(x), y)
        assert type(net.inner) is nn.Linear

    def test_a_sum_that_is_made_within_a_scale_is_that_of_outside(self, net: Net) -> None:
        for name in ("a", "b"):
            attach(net, self.CONFIG, name)
            stir(net, 0.3)
        add_weighted_adapter(net, {"a": 0.7, "b": -0.4}, "outside")
        set_adapter(net, ["a", "b"])
        with scaled(net, 0.5):
            add_weighted_adapter(net, {"a": 0.7, "b": -0.4}, "inside")
        for outside, inside in zip(adapted_weights(net, "outside"), adapted_weights(net, "inside"), strict=True):
            for one, other in zip(outside.adapter.parameters(), inside.adapter.parameters(), strict=True):
                assert torch.equal(one, other)

    def test_a_layer_without_bias_gets_one_that_cannot_be_merged(self, x: Tensor) -> None:
        layer = nn.Linear(4, 3, bias=False)
        attach(layer, LoRAConfig(rank=1, lora_bias=True))
        stir(layer)
        y = layer(x.float())
        with merged(layer):
            torch.testing.assert_close(layer(x.float()), y)
        with pytest.raises(ValueError, match=r"has a bias .lora_bias=True., and the layer has none to merge it into"):
            merge(layer)
        assert torch.equal(layer(x.float()), y)
        detach(layer)
        assert layer.bias is None

    def test_the_bias_of_the_base_can_be_trained_as_well(self, net: Net, x: Tensor) -> None:
        attach(net, LoRAConfig(rank=1, target_modules=TARGETS, lora_bias=True, bias="lora_only"))
        stir(net, 0.3)
        adapted = net(x)
        merge(net)
        torch.testing.assert_close(net(x), adapted)

    def test_pytorchs_fast_path_reads_it(self) -> None:
        x = torch.randn(2, 3, 8, dtype=torch.float64)
        encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64).eval()
        attach(encoder, LoRAConfig(rank=1, target_modules=["linear1", "linear2"], lora_bias=True))
        stir(encoder, 0.3)
        with torch.no_grad():  # PyTorch's fast path reads weights and biases
            fast = encoder(x)
        torch.testing.assert_close(fast, encoder(x).detach())

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"lora_bias": True, "use_dora": True}, "lora_bias=True cannot be combined with use_dora=True"),
            ({"bias": "some"}, "bias='some': expected one of none, all, lora_only"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, config: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LoRAConfig(**config)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("layer", "targets", "message"),
        [
            (nn.LSTM(3, 4), "all", "'weight_ih_l0' reads its weight itself"),
            (nn.Embedding(3, 4), "all", "is an embedding, for which lora_bias=True is not supported"),
        ],
    )
    def test_layers_that_cannot_have_one_are_named(self, layer: nn.Module, targets: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            attach(layer, LoRAConfig(rank=1, target_modules=targets, lora_bias=True))


def test_a_step_with_one_adapter_keeps_the_fused_pass() -> None:
    layer = nn.Linear(6, 4)
    attach(layer, LoRAConfig(rank=2))
    assert type(layer(torch.randn(3, 6)).grad_fn).__name__ == "_FusedBackward"
    assert adapted_weights(layer)[0].is_trained


class TestSettings:
    """The biases work in the settings that adapters work in."""

    CONFIG = LoRAConfig(rank=2, lora_bias=True, bias="all", alpha=3)

    @pytest.fixture
    def mlp(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))

    def test_compiled(self, mlp: nn.Sequential) -> None:
        attach(mlp, self.CONFIG)
        stir(mlp)
        x = torch.randn(4, 6)
        compiled = torch.compile(copy.deepcopy(mlp), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), mlp(x))
        compiled(x).square().sum().backward()
        mlp(x).square().sum().backward()
        of_compiled = dict(compiled.named_parameters())
        for key, value in mlp.named_parameters():
            if value.requires_grad:
                torch.testing.assert_close(of_compiled[f"_orig_mod.{key}"].grad, value.grad)

    @pytest.mark.parametrize("autocast", [True, False])
    def test_half_precision(self, mlp: nn.Sequential, autocast: bool) -> None:
        attach(mlp, self.CONFIG)
        stir(mlp)
        x = torch.randn(4, 6)
        exact = mlp(x)
        if not autocast:
            mlp.to(torch.bfloat16)
            x = x.to(torch.bfloat16)
            assert mlp[0].lora_weight.default.lora_bias.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = mlp(x)
        torch.testing.assert_close(output.float(), exact, rtol=0.05, atol=0.05)
        output.float().square().sum().backward()
        assert all(value.grad is not None for value in adapter_parameters(mlp))

    def test_transforms(self, mlp: nn.Sequential) -> None:
        attach(mlp, self.CONFIG)
        stir(mlp)
        x = torch.randn(4, 6)
        parameters = {key: value for key, value in mlp.named_parameters() if value.requires_grad}

        def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
            return torch.func.functional_call(mlp, values, (sample[None],)).square().sum()

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        mlp(x).square().sum().backward()
        for key, value in parameters.items():
            torch.testing.assert_close(each[key].sum(0), value.grad)
