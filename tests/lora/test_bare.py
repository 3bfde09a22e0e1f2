"""Whatever writes into layers or wraps them: right inside `bare`, refused or noticed outside, never counted twice."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import fuse_modules
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lora_lightning.lora import (
    LoRAConfig,
    adapted_weights,
    adapter_names,
    adapter_parameters,
    attach,
    bare,
    base_fingerprint,
    detach,
    disabled,
    is_adapted,
    is_untrained,
    merge,
    merged,
    set_adapter,
)
from lora_lightning.lora.layers import stored
from tests.helpers import same, state, stir


class Doubled(nn.Module):
    """Computes a weight from another one."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def adapted(*layers: nn.Module, config: LoRAConfig | None = None) -> nn.Sequential:
    net = nn.Sequential(*layers)
    attach(net, config or LoRAConfig(rank=2))
    stir(net, 0.5)
    return net


def update(net: nn.Sequential) -> Tensor:
    """Return the update of the first layer."""
    with torch.no_grad():
        return adapted_weights(net)[0].adapter.product()


def zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)


def double(layer: nn.Linear) -> None:
    parametrize.register_parametrization(layer, "weight", Doubled())


def norm(layer: nn.Linear) -> None:
    parametrizations.weight_norm(layer)


def spectral(layer: nn.Linear) -> None:
    parametrizations.spectral_norm(layer)


def prune_half(layer: nn.Linear) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.5)


def norm_with_a_hook(layer: nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old_weight_norm(layer)


def assign(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 3)


WRITERS = [zero, double, norm, spectral, prune_half, norm_with_a_hook, assign]


@pytest.mark.parametrize("write", WRITERS)
def test_what_writes_inside_bare_changes_the_base_alone_and_the_update_stays(
    write: Callable[[nn.Linear], None],
) -> None:
    plain = nn.Linear(6, 4)
    net, x = adapted(copy.deepcopy(plain)), torch.randn(5, 6)
    delta = update(net)
    plain.requires_grad_(False)
    write(plain)
    with bare(net):
        assert type(net[0]) is nn.Linear
        write(net[0])
    assert is_adapted(net)
    net.eval()
    plain.eval()
    with disabled(net):
        assert torch.allclose(net(x), plain(x), atol=1e-6)
    assert torch.allclose(net(x), plain(x) + x @ delta.T, atol=1e-6)
    net(x).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(net))


@pytest.mark.parametrize("write", [write for write in WRITERS if write not in (zero, norm_with_a_hook)])
def test_what_writes_outside_bare_is_refused_and_nothing_changes(write: Callable[[nn.Linear], None]) -> None:
    net, x = adapted(nn.Linear(6, 4)), torch.randn(5, 6)
    before, want = state(net), net(x)
    with pytest.raises(RuntimeError, match=r"adapters and is for reading only\. Change it inside lora\.bare\(net\)"):
        write(net[0])
    assert same(state(net), before)
    assert torch.equal(net(x), want)


@pytest.mark.parametrize("lora_bias", [False, True])
def test_an_old_weight_norm_outside_bare_is_noticed_and_the_update_counts_once(lora_bias: bool) -> None:
    net, x = adapted(nn.Linear(6, 4), config=LoRAConfig(rank=2, lora_bias=lora_bias)).eval(), torch.randn(5, 6)
    want = net(x)
    with pytest.warns(UserWarning, match=r"'weight' of a .*Linear was reparametrized outside bare\(net\)"):
        norm_with_a_hook(net[0])
    assert torch.allclose(net(x), want, atol=1e-6)
    net(x).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(net))


def test_an_old_weight_norm_within_disabled_leaves_trained_adapters_alone() -> None:
    net, x = adapted(nn.Linear(6, 4)).eval(), torch.randn(5, 6)
    want = net(x)
    with disabled(net):
        norm_with_a_hook(net[0])
    assert torch.allclose(net(x), want, atol=1e-6)


@pytest.mark.parametrize("write", [double, norm, spectral])
@pytest.mark.parametrize("keep", [True, False])
def test_a_parametrization_of_an_adapted_layer_is_removed_inside_bare_alone(
    write: Callable[[nn.Linear], None], keep: bool
) -> None:
    layer = nn.Linear(6, 4)
    write(layer)
    net, x = adapted(layer).eval(), torch.randn(5, 6)
    before, want, delta = state(net), net(x), update(net)
    with pytest.raises(RuntimeError, match=r"for reading only, also that of 'weight'\. Change them inside lora\.bare"):
        parametrize.remove_parametrizations(net[0], "weight", leave_parametrized=keep or write is norm)
    assert same(state(net), before)
    assert torch.equal(net(x), want)
    with bare(net):
        parametrize.remove_parametrizations(net[0], "weight", leave_parametrized=keep or write is norm)
    base = nn.functional.linear(x, stored(net[0], "weight"), net[0].bias)
    assert torch.allclose(net(x), base + x @ delta.T, atol=1e-6)
    if keep:
        assert torch.allclose(net(x), want, atol=1e-6)
    assert "0.weight" in net.state_dict()


def test_a_second_parametrization_of_an_adapted_layer_belongs_inside_bare() -> None:
    layer = nn.Linear(6, 4)
    double(layer)
    net = adapted(layer)
    with pytest.raises(RuntimeError, match="for reading only"):
        double(net[0])
    with pytest.raises(RuntimeError, match="for reading only"):
        net[0].weight = torch.zeros(4, 6)  # which would go through the inverse
    with bare(net):
        double(net[0])
    assert torch.equal(stored(net[0], "weight"), 4 * net[0].parametrizations["weight"].original)


@pytest.mark.parametrize("write", [prune_half, norm_with_a_hook])
def test_a_hook_that_computes_a_weight_is_removed_inside_bare_alone(write: Callable[[nn.Linear], None]) -> None:
    layer = nn.Linear(6, 4)
    write(layer)
    net, x = adapted(layer), torch.randn(5, 6)
    before, want = state(net), net(x)

    def remove() -> None:
        prune.remove(net[0], "weight") if write is prune_half else nn.utils.remove_weight_norm(net[0])

    with pytest.raises(RuntimeError, match="for reading only"):
        remove()
    assert same(state(net), before)
    assert torch.equal(net(x), want)
    with bare(net):
        remove()
    assert torch.allclose(net(x), want, atol=1e-6)
    assert "0.weight" in net.state_dict()
    merge(net)
    assert torch.allclose(net(x), want, atol=1e-6)


@pytest.mark.parametrize("write", [double, norm, spectral, prune_half, norm_with_a_hook])
def test_attaching_to_a_layer_that_computes_its_weight_changes_no_tensor_of_the_base(
    write: Callable[[nn.Linear], None],
) -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    for layer in net:
        write(layer)
    before = state(net)
    attach(net, LoRAConfig(rank=2, use_dora=True))
    attach(net, LoRAConfig(rank=1), name="other")
    base_fingerprint(net)
    with bare(net):
        pass
    detach(net)
    assert same(state(net), before)


@pytest.mark.parametrize("write", [double, norm, spectral, prune_half, norm_with_a_hook])
def test_a_computed_weight_is_merged_for_a_while_but_not_for_good(write: Callable[[nn.Linear], None]) -> None:
    layer = nn.Linear(6, 4)
    write(layer)
    net, x = adapted(layer).eval(), torch.randn(5, 6)
    want, before = net(x), state(net)
    with merged(net):
        assert torch.allclose(net(x), want, atol=1e-6)
    with pytest.raises(ValueError, match="is computed from other parameters"):
        merge(net)
    assert torch.equal(net(x), want)
    assert same(state(net), before)


def test_tied_weights_are_tied_inside_bare() -> None:
    net = nn.ModuleDict({"table": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    attach(net, LoRAConfig(rank=2))
    with pytest.raises(RuntimeError, match="for reading only"):
        net["head"].weight = nn.Parameter(net["table"].weight)
    with pytest.raises(TypeError, match="cannot assign"):
        net["head"].weight = net["table"].weight
    with bare(net):
        net["head"].weight = net["table"].weight
    assert stored(net["head"], "weight") is stored(net["table"], "weight")
    assert is_adapted(net["head"])
    assert is_adapted(net["table"])


def test_a_layer_that_was_resized_or_replaced_inside_bare_is_named_and_the_others_keep_their_adapters() -> None:
    net, x = adapted(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(5, 6)

    def change() -> None:
        with bare(net):
            net[1] = nn.Linear(6, 7)
            net[2].weight = nn.Parameter(torch.randn(3, 7))
            net[2].bias = nn.Parameter(torch.randn(3))

    with pytest.warns(UserWarning, match=r"replaced or resized inside bare\(net\).*: '1', '2'\. Attach new adapters"):
        change()
    assert [weight.name for weight in adapted_weights(net)] == ["0"]
    assert net(x).shape == (5, 3)
    assert type(net[2]) is nn.Linear
    assert adapter_names(net) == ["default"]
    detach(net)
    assert type(net[0]) is nn.Linear


def test_sizes_of_an_adapted_layer_are_changed_inside_bare_alone() -> None:
    net = nn.Sequential(nn.Embedding(9, 4))
    attach(net, LoRAConfig(rank=2))
    with pytest.raises(RuntimeError, match="cannot become 12, since the layer has adapters of its present size"):
        net[0].num_embeddings = 12
    assert net[0].num_embeddings == 9


def test_a_convolution_is_fused_with_its_norm_after_merging() -> None:
    net, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).eval(), torch.randn(2, 2, 5, 5)
    attach(net, LoRAConfig(rank=2))
    stir(net, 0.5)
    want = net(x)
    with pytest.raises(RuntimeError, match="for reading only"):
        fuse_conv_bn_eval(net[0], net[1])
    assert torch.equal(net(x), want)
    merge(net)
    assert torch.allclose(fuse_modules(net, ["0", "1"])(x), want, atol=1e-5)


def test_an_error_inside_bare_brings_the_adapters_back() -> None:
    net, x = adapted(nn.Linear(6, 4)), torch.randn(5, 6)
    want = net(x)
    with pytest.raises(KeyError), bare(net):
        raise KeyError
    assert torch.equal(net(x), want)


def test_bare_inside_bare_ends_with_the_outer_one() -> None:
    net, x = adapted(nn.Linear(6, 4)), torch.randn(5, 6)
    want = net(x)
    with bare(net):
        with bare(net):
            assert type(net[0]) is nn.Linear
        assert type(net[0]) is nn.Linear
    assert torch.equal(net(x), want)


def test_nothing_is_attached_chosen_or_removed_inside_bare() -> None:
    net = adapted(nn.Linear(6, 4))
    before = state(net)
    calls: list[Callable[[], object]] = [
        lambda: attach(net, LoRAConfig(rank=1), name="other"),
        lambda: detach(net),
        lambda: merge(net),
        lambda: set_adapter(net, "default"),
    ]
    for call in calls:
        with bare(net), pytest.raises(RuntimeError, match=r"of '0' are set aside: .* (outside of|after) bare\(net\)"):
            call()
    assert same(state(net), before)


def test_a_state_dict_is_assigned() -> None:
    net, other, x = adapted(nn.Linear(6, 4)), adapted(nn.Linear(6, 4)), torch.randn(5, 6)
    net.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(net(x), other(x))
    assert torch.equal(stored(net[0], "weight"), stored(other[0], "weight"))
    assert not net[0]._parameters["weight"].requires_grad
    assert len(adapter_parameters(net)) == 2
    net(x).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(net))


def test_a_plain_state_dict_is_assigned_to_a_module_on_meta() -> None:
    plain, x = nn.Sequential(nn.Linear(6, 4), nn.LSTM(4, 3)), torch.randn(5, 6)
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(6, 4), nn.LSTM(4, 3))
    attach(net, LoRAConfig(rank=2))
    net.load_state_dict(plain.state_dict(), strict=False, assign=True)
    for weight in adapted_weights(net):
        weight.adapter.to_empty(device="cpu")
        weight.adapter.reset_parameters()
    assert torch.equal(net(x)[0], plain(x)[0])


def materialize(net: nn.Module) -> None:
    """Give the modules on meta values as Lightning does."""
    for module in net.modules():
        if any(tensor.is_meta for tensor in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()


@pytest.mark.parametrize("in_one_go", [True, False])
def test_an_adapted_module_on_meta_gets_a_fresh_base_and_fresh_adapters(in_one_go: bool) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 8), nn.LSTM(8, 4), nn.GRUCell(4, 4), nn.Embedding(5, 4), nn.Conv1d(3, 4, 2))

    with torch.device("meta"):
        net = make()
    attach(net, LoRAConfig(rank=2))
    if in_one_go:
        net.to_empty(device="cpu")
        for parameter in net.parameters():
            nn.init.constant_(parameter, float("nan"))
        for module in net.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    else:
        materialize(net)
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    base = {key: value for key, value in net.state_dict().items() if "lora_" not in key}
    assert base.keys() == make().state_dict().keys()
    assert all(0 < value.abs().max() < 5 for value in base.values())
    for weight in adapted_weights(net):
        assert weight.adapter.lora_A.any()
        assert not weight.adapter.lora_B.any()


def test_an_adapted_attention_on_meta_is_treated_as_a_plain_one() -> None:
    with torch.device("meta"):
        net, plain = nn.Sequential(nn.MultiheadAttention(8, 2)), nn.Sequential(nn.MultiheadAttention(8, 2))
    attach(net, LoRAConfig(rank=2))
    for module in (net, plain):
        materialize(module)
        module[0]._reset_parameters()  # which plain PyTorch has no other name for
        assert module[0].in_proj_bias.eq(0).all()
    assert 0 < stored(net[0], "in_proj_weight").abs().max() <= (6 / 32) ** 0.5
    x = torch.randn(3, 1, 8)
    output = net[0](x, x, x)[0]
    with disabled(net):
        assert torch.equal(output, net[0](x, x, x)[0])


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=2, use_dora=True),
        LoRAConfig(rank=2, lora_bias=True),
        LoRAConfig(rank=2, lora_bias=True, init="pissa"),
    ],
    ids=["dora", "bias", "pissa with a bias"],
)
def test_resetting_a_trained_layer_gives_a_fresh_base_and_a_fresh_adapter(config: LoRAConfig) -> None:
    net, x = adapted(nn.Linear(6, 4), config=config), torch.randn(5, 6)
    before = stored(net[0], "weight").clone()
    net[0].reset_parameters()
    assert not torch.equal(stored(net[0], "weight"), before)
    assert is_untrained(net)
    output = net(x)
    with disabled(net):
        assert torch.allclose(output, net(x), atol=1e-6)


class Resettable(nn.Module):
    """A network that gives its layers new values itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def reset_parameters(self) -> None:
        self.layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        return output


def test_resetting_a_network_with_a_bypass_gives_a_fresh_base_and_fresh_adapters() -> None:
    net, x = Resettable(), torch.randn(5, 4)
    attach(net, LoRAConfig(rank=2, bypass=(4, 4)))
    stir(net, 0.5)
    before = stored(net.layer, "weight").clone()
    net.reset_parameters()
    assert not torch.equal(stored(net.layer, "weight"), before)
    output = net(x)
    with disabled(net):
        assert torch.equal(output, net(x))


def test_initialization_by_apply_inside_bare_leaves_the_adapters_alone() -> None:
    net = adapted(nn.Linear(6, 4), nn.LSTM(4, 3))
    before = [parameter.clone() for parameter in adapter_parameters(net)]

    def ones(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            nn.init.ones_(parameter)

    with bare(net):
        net.apply(ones)
    assert same([*map(torch.Tensor.detach, adapter_parameters(net))], before)
    assert stored(net[0], "weight").eq(1).all()
    assert stored(net[1], "weight_hh_l0").eq(1).all()


def test_a_layer_is_quantized_inside_bare() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    net, x = adapted(nn.Linear(64, 32)), torch.randn(5, 64)
    before, delta = net(x), update(net)
    config = torchao.Int8WeightOnlyConfig()
    with bare(net):
        torchao.quantize_(net, config)
    assert is_adapted(net)
    assert (net(x) - before).abs().max() < 0.1 * before.abs().max()
    with disabled(net):
        base = net(x)
    assert torch.allclose(net(x), base + x @ delta.T, atol=1e-5)


def test_what_quantizes_outside_bare_is_refused_and_nothing_changes() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    net, x = adapted(nn.Linear(64, 32)), torch.randn(5, 64)
    want = net(x)
    with pytest.raises(RuntimeError, match="for reading only"):
        torchao.quantize_(net, torchao.Int8WeightOnlyConfig())
    assert torch.equal(net(x), want)


class Own(nn.Linear):
    """A layer of a user that reads its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, 2 * self.weight, self.bias)


def test_a_traced_module_follows_adapters_in_layers_that_read_their_weights() -> None:
    net, x = adapted(Own(6, 4), nn.Linear(4, 3)), torch.randn(5, 6)
    traced = fx.symbolic_trace(net)
    assert torch.equal(traced(x), net(x))
    stir(net, 1)
    assert torch.equal(traced(x), net(x))
    with disabled(net):
        assert torch.equal(traced(x), net(x))


def test_tracing_into_a_module_that_reads_its_weight_is_refused() -> None:
    layer, x = Own(6, 4), torch.randn(5, 6)
    attach(layer, LoRAConfig(rank=2))
    want = layer(x)
    with pytest.raises(RuntimeError, match=r"torch\.fx traces into this LoRAOwn .* Merge the adapters first"):
        fx.symbolic_trace(layer)
    assert torch.equal(layer(x), want)


def test_a_plain_checkpoint_renews_the_norms_of_an_untrained_dora_adapter() -> None:
    net, plain, x = nn.Sequential(nn.Linear(6, 4)), nn.Sequential(nn.Linear(6, 4)), torch.randn(5, 6)
    attach(net, LoRAConfig(rank=2, use_dora=True))
    net.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(net(x), plain(x))


def test_the_weight_in_effect_is_formed_outside_of_autocast() -> None:
    net = nn.MultiheadAttention(8, 2)
    attach(net, LoRAConfig(rank=2))
    stir(net, 1)
    want = net.in_proj_weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.in_proj_weight, want)
