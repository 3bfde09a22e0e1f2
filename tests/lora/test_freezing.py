"""What is frozen stays frozen, what trains is trained, and `detach` gives everything back."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lora_lightning.lora import (
    LoRAConfig,
    adapted_weights,
    adapter_names,
    adapter_parameters,
    adapter_state_dict,
    attach,
    bare,
    base_fingerprint,
    delete_adapter,
    detach,
    disabled,
    is_adapted,
    merge,
    merged,
    set_adapter,
)
from tests.helpers import same, state, stir


class Net(nn.Module):
    """A network with a norm layer in a part that its users call directly."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.body(x))
        return output


@pytest.fixture
def x() -> Tensor:
    return torch.randn(16, 8) * 3 + 1


def flags(module: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6), nn.InstanceNorm1d(6, affine=True, track_running_stats=True)])
def test_statistics_stay_through_train_copies_and_threads(norm: nn.Module) -> None:
    net, x = nn.Sequential(nn.Linear(8, 6), norm).eval(), torch.randn(4, 6, 6)
    want = net[1](x)
    attach(net, LoRAConfig(rank=2))
    before = state(net)

    def train() -> None:
        for _ in range(20):
            net.train()
            net[1](x)
            net.eval()
            net[1].train()

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(state(net), before)
    clone = copy.deepcopy(net).train()
    assert torch.equal(clone[1](x), want)
    assert same(state(clone), before)


@pytest.mark.parametrize("call", ["the module", "a part"])
def test_statistics_stay_when_the_layers_are_replaced_for_many_devices(call: str, x: Tensor) -> None:
    net = Net().eval()
    want, hidden = net(x), net.body(x)
    attach(net, LoRAConfig(rank=2))
    before = state(net)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.train()
    if call == "the module":
        assert torch.allclose(net(x), want, atol=1e-6)
    else:
        assert torch.allclose(net.body(x), hidden, atol=1e-6)
    assert same(state(net), before)
    detach(net)
    assert type(net.body[1]) is nn.SyncBatchNorm
    assert net.body[1].training
    assert all(flags(net).values())
    assert not net._forward_pre_hooks
    assert not net.body._forward_pre_hooks


def test_a_layer_in_a_copy_is_frozen_again_and_not_that_of_the_original(x: Tensor) -> None:
    net = Net().eval()
    want = net(x)
    attach(net, LoRAConfig(rank=2))
    clone = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net)).train()
    assert torch.allclose(clone(x), want, atol=1e-6)
    assert type(clone.body[1]) is not type(net.body[1])
    detach(clone)
    net.train()
    assert torch.equal(net(x), want)


def test_the_estimate_of_a_spectral_norm_stays_in_training(x: Tensor) -> None:
    net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 6))).eval()
    want = net(x)
    attach(net, LoRAConfig(rank=2))
    before = state(net)
    assert torch.equal(net.train()(x), want)
    assert same(state(net), before)
    assert torch.equal(copy.deepcopy(net)(x), want)
    detach(net)
    net(x)
    assert not same(state(net), {key: value for key, value in before.items() if "lora_" not in key})


def test_the_mode_that_was_set_meanwhile_counts_after_detach() -> None:
    net = Net().eval()
    attach(net, LoRAConfig(rank=2))
    net.train()
    detach(net)
    assert net.body[1].training


def test_norms_in_modules_that_are_trained_in_full_learn_statistics(x: Tensor) -> None:
    net = Net()
    attach(net, LoRAConfig(rank=2, modules_to_save=["body.1"]), name="first")
    attach(net, LoRAConfig(rank=2), name="second")
    net.train()
    before = state(net.body[1])
    net(x)
    assert same(state(net.body[1]), before)
    set_adapter(net, "first")
    net(x)
    assert not same(state(net.body[1]), before)
    set_adapter(net, "second")
    assert same(state(net.body[1]), before)
    detach(net)
    assert same(state(net.body[1]), before)


def test_choosing_an_adapter_trains_it_again_after_all_was_frozen(x: Tensor) -> None:
    net = Net()
    attach(net, LoRAConfig(rank=2, modules_to_save=["head"]))
    want = {name for name, trained in flags(net).items() if trained}
    net.requires_grad_(False)
    set_adapter(net, "default")
    assert {name for name, trained in flags(net).items() if trained} == want
    net.requires_grad_(True)
    set_adapter(net, "default")
    assert {name for name, trained in flags(net).items() if trained} == want


def test_detach_gives_flags_back_also_those_that_were_changed_meanwhile() -> None:
    net = Net()
    net.head.bias.requires_grad_(False)
    before = flags(net)
    attach(net, LoRAConfig(rank=2, modules_to_save=["head"]))
    net.requires_grad_(True)
    detach(net)
    assert flags(net) == before


@pytest.mark.parametrize("verb", ["attach", "set_adapter"])
def test_an_optimizer_of_before_moves_nothing_that_is_frozen(verb: str, x: Tensor) -> None:
    net = Net().eval()
    if verb == "set_adapter":
        attach(net, LoRAConfig(rank=2), name="first")
        attach(net, LoRAConfig(rank=2), name="second")
        set_adapter(net, "first")
        stir(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9)
    net(x).square().sum().backward()
    attach(net, LoRAConfig(rank=2), name="new") if verb == "attach" else set_adapter(net, "second")
    before = state(net)
    optimizer.step()
    assert same(state(net), before)


def test_gradients_of_what_is_still_trained_are_kept(x: Tensor) -> None:
    net = Net().eval()
    attach(net, LoRAConfig(rank=2))
    net(x).sum().backward()
    set_adapter(net, "default")
    assert all(parameter.grad is not None for parameter in adapter_parameters(net))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_trained_in_full_and_whole_numbers_are_not(dtype: torch.dtype) -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, dtype=dtype))
            self.index = nn.Parameter(torch.arange(5), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.irfft(torch.fft.rfft(x)[..., self.index] * self.weight, n=8)

    net = nn.Sequential(nn.Linear(8, 8), Spectrum())
    attach(net, LoRAConfig(rank=2, modules_to_save=["1"]))
    before = state(net)
    assert net[1].weight.requires_grad
    assert not net[1].index.requires_grad
    optimizer = torch.optim.AdamW(adapter_parameters(net), lr=0.1)
    net(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(net[1].weight, before["1.weight"])
    with disabled(net):
        assert torch.equal(net[1].weight, before["1.weight"])
    detach(net)
    assert torch.equal(net[1].weight, before["1.weight"])


def test_a_sparse_table_through_target_parameters_is_refused() -> None:
    for table in (nn.EmbeddingBag(9, 4, sparse=True), nn.EmbeddingBag(9, 4, max_norm=1.0)):
        net = nn.Sequential(table)
        with pytest.raises(ValueError, match=r"use sparse=False|which change the weight"):
            attach(net, LoRAConfig(rank=2, target_modules=[], target_parameters=["0.weight"]))
        assert type(net[0]) is nn.EmbeddingBag
        assert net[0].weight.requires_grad


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_of_embeddings_through_target_parameters_is_that_of_the_sum(mode: str) -> None:
    plain = nn.EmbeddingBag(9, 4, mode=mode, padding_idx=1)
    net, ids = nn.Sequential(copy.deepcopy(plain)), torch.tensor([[1, 2, 4], [5, 1, 8]])
    attach(net, LoRAConfig(rank=2, target_modules=[], target_parameters=["0.weight"]))
    stir(net, 1)
    with torch.no_grad():
        plain.weight += adapted_weights(net)[0].adapter.product()
    assert torch.allclose(net(ids), plain(ids), atol=1e-6)
    net(ids).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(net))
    merge(net)
    assert torch.allclose(net(ids), plain(ids), atol=1e-6)


def test_a_bilinear_form_has_one_matrix_per_output() -> None:
    net, x, y = nn.Bilinear(3, 4, 5), torch.randn(6, 3), torch.randn(6, 4)
    base = net(x, y)
    attach(net, LoRAConfig(rank=2, target_modules=[], target_parameters=["weight"]))
    stir(net, 1)
    a, b = adapter_parameters(net)
    assert (a.shape, b.shape) == ((2, 5, 4), (3, 2, 5))
    want = base + torch.einsum("ni,iro,roj,nj->no", x, b, a, y)
    assert torch.allclose(net(x, y), want, atol=1e-5)
    merge(net)
    assert torch.allclose(net(x, y), want, atol=1e-5)


class TestSeveralRoots:
    """An encoder that two networks share, parts that were copied, wrappers: nothing trained is replaced or lost."""

    def test_a_second_attach_through_another_module_keeps_the_first_adapters(self, x: Tensor) -> None:
        net = Net().eval()
        attach(net, LoRAConfig(rank=2), name="first")
        stir(net)
        want, first = net(x), [parameter.clone() for parameter in adapter_parameters(net)]
        outer = nn.Sequential(net)
        attach(outer, LoRAConfig(rank=3), name="second")
        assert adapter_names(outer) == ["second", "first"]
        set_adapter(outer, "first")
        assert torch.equal(outer(x), want)
        assert same([parameter.detach() for parameter in adapter_parameters(outer)], first)
        with pytest.raises(ValueError, match="already has adapters on"):
            attach(outer, LoRAConfig(rank=2), name="first")

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_detaching_both_gives_all_flags_and_values_back(self, order: tuple[int, int], x: Tensor) -> None:
        encoder = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6))
        encoder[0].bias.requires_grad_(False)
        nets = nn.Sequential(encoder, nn.Linear(6, 3)), nn.Sequential(encoder, nn.Linear(6, 2))
        before = [(state(net), flags(net)) for net in nets]
        attach(nets[0], LoRAConfig(rank=2), name="a")
        attach(nets[1], LoRAConfig(rank=2), name="b")
        for position in order:
            stir(nets[position])
            detach(nets[position])
        assert same([(state(net), flags(net)) for net in nets], before)
        assert encoder[1].training
        assert not any(module._forward_pre_hooks for net in nets for module in net.modules())

    def test_a_shared_encoder_holds_the_adapters_of_both(self, x: Tensor) -> None:
        encoder = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
        first, second = nn.Sequential(encoder, nn.Linear(6, 3)), nn.Sequential(encoder, nn.Linear(6, 2))
        attach(first, LoRAConfig(rank=2))
        with pytest.raises(ValueError, match=r"already has adapters on \['0\.0'\]"):
            attach(second, LoRAConfig(rank=2))
        stir(first)
        want = first(x)
        attach(second, LoRAConfig(rank=2), name="b")
        stir(second)
        of_second = second(x)
        set_adapter(first, "default")
        assert torch.equal(first(x), want)
        set_adapter(second, "b")
        assert torch.equal(second(x), of_second)

    def test_modules_trained_in_full_through_two_modules_are_refused(self) -> None:
        head = nn.Linear(6, 3)
        first, second = nn.Sequential(nn.Linear(8, 6), head), nn.Sequential(nn.Linear(8, 6), head)
        attach(first, LoRAConfig(rank=2, modules_to_save=["1"]), name="a")
        before = state(second)
        with pytest.raises(ValueError, match="'1' is already trained in full with the adapters of a Sequential"):
            attach(second, LoRAConfig(rank=2, modules_to_save=["1"]), name="b")
        assert same(state(second), before)
        assert not is_adapted(second)
        detach(first)
        attach(second, LoRAConfig(rank=2, modules_to_save=["1"]), name="b")

    def test_a_part_that_is_copied_computes_and_trains_on_its_own(self, x: Tensor) -> None:
        net = Net().eval()
        attach(net, LoRAConfig(rank=2))
        stir(net)
        want = net.body(x)
        part = copy.deepcopy(net.body)
        assert torch.equal(part(x), want)
        assert is_adapted(part)
        attach(part, LoRAConfig(rank=1), name="more")
        stir(part)
        assert torch.equal(net.body(x), want)
        set_adapter(part, "default")
        assert torch.equal(part(x), want)
        detach(net)
        assert torch.equal(part(x), want)

    def test_a_compiled_module_shares_its_adapters_with_the_one_inside(self, x: Tensor) -> None:
        net = Net().eval()
        compiled = torch.compile(net, backend="eager")
        attach(net, LoRAConfig(rank=2), name="first")
        stir(net)
        first = {key: value.clone() for key, value in adapter_state_dict(net).items()}
        with pytest.raises(ValueError, match="already has adapters on"):
            attach(compiled, LoRAConfig(rank=2), name="first")
        attach(compiled, LoRAConfig(rank=2), name="second")
        assert adapter_names(net) == adapter_names(compiled) == ["second", "first"]
        set_adapter(compiled, "first")
        assert same(adapter_state_dict(net), first)
        with bare(compiled), merged(compiled):
            assert type(net.head) is nn.Linear
        delete_adapter(compiled, "second")
        detach(compiled)
        assert not is_adapted(net)

    def test_a_compiled_module_inside_another_is_adapted_once(self, x: Tensor) -> None:
        net = Net().eval()
        base, outer = net(x), nn.Sequential(torch.compile(net, backend="eager"))
        names = attach(outer, LoRAConfig(rank=2))
        assert len(names) == 2
        assert base_fingerprint(outer)
        stir(outer)
        with disabled(outer):
            assert torch.allclose(outer(x), base, atol=1e-6)
        detach(outer)
        assert all(flags(net).values())


class TestMergeRefuses:
    """Before it writes anything."""

    def test_tied_weights(self) -> None:
        net = nn.ModuleDict({"table": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
        net["head"].weight = net["table"].weight
        attach(net, LoRAConfig(rank=2))
        stir(net)
        before = state(net)
        with pytest.raises(ValueError, match="is shared"):
            merge(net)
        with pytest.raises(ValueError, match="is shared"), merged(net):
            pass
        assert same(state(net), before)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_adapters_that_are_not_finite(self, value: float, x: Tensor) -> None:
        net = Net()
        attach(net, LoRAConfig(rank=2))
        stir(net)
        with torch.no_grad():
            adapter_parameters(net)[1][0] = value
        before, want = state(net), net.eval()(x)
        with pytest.raises(ValueError, match=r"adapters of 'body\.0' contain NaN or infinity"):
            merge(net)
        assert str(state(net)) == str(before)
        assert str(net(x)) == str(want)
        merge(net, check_finite=False)
        assert not is_adapted(net)

    @pytest.mark.parametrize("config", [LoRAConfig(rank=2), LoRAConfig(rank=2, lora_bias=True)], ids=["weight", "bias"])
    def test_an_update_that_overflows_the_dtype_of_the_base(self, config: LoRAConfig) -> None:
        net = nn.Sequential(nn.Linear(4, 3)).half()
        attach(net, config)
        with torch.no_grad():
            adapter_parameters(net)[-1].fill_(1e6)
        before = state(net)
        with pytest.raises(ValueError, match=r"adapters of '0' contain NaN or infinity, or .* too large for its dtype"):
            merge(net)
        assert same(state(net), before)

    def test_a_base_that_is_not_finite_itself_is_merged(self) -> None:
        net = nn.Sequential(nn.Linear(4, 3))
        with torch.no_grad():
            net[0].weight[0, 0] = float("inf")
        attach(net, LoRAConfig(rank=2))
        stir(net)
        merge(net)
        assert net[0].weight.isfinite().sum() == 11

    def test_a_class_that_was_replaced_after_ours(self) -> None:
        def attach_another(net: nn.Module) -> None:
            attach(net, LoRAConfig(rank=2, lora_bias=True, exclude_modules=["body.2"]), "another")

        def delete_one(net: nn.Module) -> None:
            delete_adapter(net, "biased")

        net = Net()
        attach(net, LoRAConfig(rank=2, lora_bias=True, target_modules=["head"]), "biased")
        attach(net, LoRAConfig(rank=2))
        stir(net)
        before, own = state(net), type(net.head)
        net.head.__class__ = type("Wrapped", (own,), {})
        for call in (merge, detach, attach_another, delete_one):
            with pytest.raises(RuntimeError, match=r"class of this Linear was replaced with Wrapped after attach"):
                call(net)
            assert type(net.head).__name__ == "Wrapped"
        assert same(state(net), before)
        net.head.__class__ = own
        merge(net)


def test_no_class_of_the_user_is_kept_alive() -> None:
    class Own(nn.Linear):
        """A layer of the user."""

    class Norm(nn.BatchNorm1d):
        """A norm layer of the user."""

    net = nn.Sequential(Own(8, 6), Norm(6))
    attach(net, LoRAConfig(rank=2))
    net(torch.randn(3, 8))
    detach(net)
    classes = weakref.ref(Own), weakref.ref(Norm)
    del net, Own, Norm
    for _ in range(3):  # Python collects a class after its subclasses
        gc.collect()
    assert [cls() for cls in classes] == [None, None]
