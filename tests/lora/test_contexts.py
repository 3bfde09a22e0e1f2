"""Contexts and verbs that overlap end as if they had not, or are refused with the network whole."""

from __future__ import annotations

import copy
import importlib
import io
import itertools
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_lightning import load_adapter, save_adapter
from lora_lightning.lora import (
    Adapter,
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
    scaled,
    set_adapter,
)
from lora_lightning.lora.record import config_of
from tests.helpers import same, state, stir

Context = Callable[[nn.Module], AbstractContextManager[object]]


def halved(module: nn.Module) -> AbstractContextManager[None]:
    return scaled(module, 0.5)


CONTEXTS: list[Context] = [disabled, merged, halved, bare]


class Net(nn.Module):
    """Has a linear layer, one that reads its weight, and one that is trained in full."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.rnn, self.head = nn.Linear(8, 6), nn.GRU(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.rnn(self.first(x))[0])
        return output


def adapted(*names: str) -> Net:
    """Return a network with adapters of these names, of which the first are active."""
    net = Net()
    for name in names or ("default",):
        attach(net, LoRAConfig(rank=2, modules_to_save=["head"], use_dora=name == "dora"), name=name)
        stir(net, 0.5)
    set_adapter(net, (names or ("default",))[0])
    return net


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 8)


def whole(net: nn.Module) -> tuple[dict[str, Tensor], list[str], list[str], list[type]]:
    """Return everything that an interrupted verb could have changed."""
    trained = [name for name, value in net.named_parameters() if value.requires_grad]
    return state(net), trained, adapter_names(net), [type(module) for module in net.modules()]


@pytest.mark.parametrize(("outer", "inner"), [*itertools.product(CONTEXTS, CONTEXTS)])
@pytest.mark.parametrize("name", ["default", "dora"])
def test_contexts_that_end_in_another_order_than_they_began_leave_nothing(
    outer: Context, inner: Context, name: str, x: Tensor
) -> None:
    net = adapted(name)
    want, before = net(x), whole(net)

    def generate(context: Context) -> Iterator[None]:
        with context(net):
            net(x)
            yield

    first, second = generate(outer), generate(inner)
    next(first)
    next(second)
    first.close()
    net(x)
    second.close()
    assert torch.equal(net(x), want)
    assert same(whole(net), before)


@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts_of_two_threads_leave_nothing(context: Context, x: Tensor) -> None:
    net = adapted()
    want, before = net(x), whole(net)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work() -> None:
        for _ in range(25):
            with context(net), torch.no_grad():
                net.first(x)

    try:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert torch.equal(net(x), want)
    assert same(whole(net), before)


@pytest.mark.parametrize("name", ["linear", "conv", "gru", "bypass"])
def test_a_forward_pass_goes_on_when_another_thread_enters_bare(name: str, x: Tensor) -> None:
    layers = {"linear": nn.Linear(8, 6), "conv": nn.Conv1d(8, 6, 1), "gru": nn.GRU(8, 6), "bypass": Net()}
    net = layers[name] if name == "bypass" else nn.Sequential(layers[name])
    around = {"target_modules": [], "bypass": (8, 4)} if name == "bypass" else {}
    attach(net, LoRAConfig(rank=2, **around))
    stir(net)
    layer, x = layers[name], x[..., None] if name == "conv" else x
    begun = layer.forward
    with bare(net):
        assert same(begun(x), layer(x))


def test_a_forward_pass_that_has_its_adapters_ends_when_another_thread_enters_bare(x: Tensor) -> None:
    net = adapted()
    (kind, adapters), want = (net.first.lora_weight.kind, net.first.lora_weight.in_effect.adapters), net.first(x)
    with bare(net):
        assert torch.equal(kind.adapted(net.first, net.first.weight, x, adapters), want)


def test_a_weight_that_is_being_read_is_that_of_the_base_when_another_thread_enters_bare() -> None:
    net = adapted()
    read = type(net.rnn).weight_ih_l0.fget
    with bare(net):
        assert read(net.rnn) is net.rnn.weight_ih_l0


@pytest.mark.parametrize("context", CONTEXTS)
def test_an_error_within_a_context_ends_it(context: Context, x: Tensor) -> None:
    net = adapted()
    want, before = net(x), whole(net)
    with pytest.raises(KeyError), context(net):
        raise KeyError
    assert torch.equal(net(x), want)
    assert same(whole(net), before)


def test_disabled_is_the_base_inside_and_outside_of_the_other_contexts(x: Tensor) -> None:
    base, net = Net()(x), adapted()
    with disabled(net), merged(net), scaled(net, 0.5):
        assert torch.equal(net(x), base)
    with scaled(net, 0.5), merged(net), disabled(net):
        assert torch.equal(net(x), base)


def test_two_scales_multiply_and_the_inner_one_may_end_last(x: Tensor) -> None:
    net = adapted()
    want, outer, inner = net(x), scaled(net, 4.0), scaled(net, 0.25)
    outer.__enter__()
    inner.__enter__()
    assert torch.allclose(net(x), want, atol=1e-6)
    outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert torch.equal(net(x), want)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_a_scale_of_0_is_the_base_and_one_of_1_changes_nothing(use_dora: bool, init: str, x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    base = net(x)
    attach(net, LoRAConfig(rank=2, use_dora=use_dora, init=init))
    stir(net, 0.5)
    want = net(x)
    with scaled(net, 0):
        assert torch.allclose(net(x), base, atol=1e-6)
    with scaled(net, 1):
        assert torch.equal(net(x), want)
    with scaled(net, 0.5), merged(net):
        half = net(x)
    with scaled(net, 0.5):
        assert torch.allclose(net(x), half, atol=1e-5)
    assert not torch.allclose(half, want, atol=1e-3)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_dora_starts_from_the_norms_of_a_weight_that_is_there(init: str) -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 16))
    for config in (LoRAConfig(rank=2, use_dora=True, init=init), LoRAConfig(rank=2, init="pissa")):
        with pytest.raises(ValueError, match=r"is on meta, and .* load the weights first"):
            attach(net, config)
    assert not is_adapted(net)


def test_another_adapter_may_be_chosen_while_all_are_disabled(x: Tensor) -> None:
    net, base = adapted("first", "second"), Net()(x)
    first = net(x)
    set_adapter(net, "second")
    second = net(x)
    with disabled(net):
        set_adapter(net, "first")
        assert torch.equal(net(x), base)
    assert torch.equal(net(x), first)
    set_adapter(net, "second")
    assert torch.equal(net(x), second)


@pytest.mark.parametrize("context", [disabled, merged, bare])
@pytest.mark.parametrize("verb", ["attach", "merge"])
def test_attach_and_merge_within_a_context_are_refused_and_change_nothing(
    context: Context, verb: str, x: Tensor
) -> None:
    net = adapted("first", "second")
    want, before = net(x), whole(net)
    with context(net), pytest.raises(RuntimeError, match=rf"outside of {context.__name__}\(net\)|after bare\(net\)"):
        merge(net) if verb == "merge" else attach(net, LoRAConfig(rank=3), name="third")
    assert torch.equal(net(x), want)
    assert same(whole(net), before)


@pytest.mark.parametrize("context", [merged, bare])
@pytest.mark.parametrize("verb", [set_adapter, delete_adapter])
def test_a_choice_within_merged_or_bare_is_refused_and_changes_nothing(
    context: Context, verb: Callable[[nn.Module, str], None], x: Tensor
) -> None:
    net = adapted("first", "second")
    want, before = net(x), whole(net)
    with context(net), pytest.raises(RuntimeError, match=rf"outside of {context.__name__}\(net\)"):
        verb(net, "second" if verb is set_adapter else "first")
    assert torch.equal(net(x), want)
    assert same(whole(net), before)


@pytest.mark.parametrize("context", [disabled, merged, halved])
def test_detach_within_a_context_leaves_the_base(context: Context, x: Tensor) -> None:
    original, net = Net(), adapted()
    with context(net):
        detach(net)
        assert torch.equal(net(x), original(x))
    assert torch.equal(net(x), original(x))
    assert same(state(net), state(original))
    assert not is_adapted(net)


@pytest.mark.parametrize("context", [merged, halved])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_that_is_made_within_a_context_is_outside_of_it(
    context: Context, copied: Callable[[nn.Module], nn.Module], x: Tensor
) -> None:
    net = adapted()
    want = net(x)
    with context(net):
        clone = copied(net)
    assert torch.equal(clone(x), want)
    detach(clone)
    assert torch.equal(net(x), want)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_within_disabled_is_refused_where_modules_have_their_original_values(
    copied: Callable[[nn.Module], nn.Module], x: Tensor
) -> None:
    net = adapted()
    want = net(x)
    with disabled(net), pytest.raises(RuntimeError, match=r"Copy or save the module after disabled\(net\)"):
        copied(net)
    assert torch.equal(net(x), want)


def test_a_file_saved_within_disabled_has_its_adapters_on(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(8, 16))
    attach(net, LoRAConfig(rank=2))
    stir(net)
    want, file = net(x), io.BytesIO()
    with disabled(net):
        torch.save(net, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), want)


def test_a_question_for_the_active_adapters_within_bare_is_answered_with_a_way_out(tmp_path: Path) -> None:
    net = adapted()
    with bare(net):
        for ask in (partial(save_adapter, net, tmp_path), partial(config_of, net)):
            with pytest.raises(ValueError, match=r"no adapters now: .* outside of bare"):
                ask()


def test_a_copy_within_bare_is_plain(x: Tensor) -> None:
    net = adapted()
    with bare(net):
        clone = copy.deepcopy(net)
    assert not is_adapted(clone)
    assert is_adapted(net)


@pytest.mark.parametrize("context", [disabled, merged, halved])
def test_a_folder_that_is_saved_within_a_context_is_that_of_outside(
    context: Context, x: Tensor, tmp_path: object
) -> None:
    net, other = adapted(), Net()
    want = net(x)
    with context(net):
        save_adapter(net, f"{tmp_path}/adapter")
    load_adapter(other, f"{tmp_path}/adapter")
    assert torch.equal(other(x), want)


@pytest.mark.parametrize("context", [disabled, merged, halved])
def test_the_base_and_the_adapters_are_the_same_within_a_context(context: Context) -> None:
    net = adapted()
    base, adapters = base_fingerprint(net), {key: value.clone() for key, value in adapter_state_dict(net).items()}
    with context(net):
        assert base_fingerprint(net) == base
        lora = {key: value for key, value in adapter_state_dict(net).items() if "lora_" in key}
        assert same(lora, {key: value for key, value in adapters.items() if "lora_" in key})


def test_gradients_flow_where_adapters_count_and_nowhere_within_disabled_or_merged(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(8, 4))
    attach(net, LoRAConfig(rank=2))
    stir(net)
    for context in (disabled, merged):
        with context(net):
            assert not net(x).requires_grad
    net(x).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(net))


def test_adapters_are_trained_while_another_thread_evaluates(x: Tensor) -> None:
    net = adapted()
    want, stop, wrong = net(x).detach(), threading.Event(), list[float]()

    def evaluate() -> None:
        while not stop.is_set():
            with torch.no_grad():
                wrong.append(float((net(x) - want).abs().max()))

    thread = threading.Thread(target=evaluate)
    thread.start()
    for _ in range(20):
        net.zero_grad()
        net(x).sum().backward()
        assert all(parameter.grad is not None for parameter in adapter_parameters(net))
    stop.set()
    thread.join()
    assert max(wrong) < 1e-6


def test_a_mixture_whose_experts_another_thread_evaluates_is_trained(x: Tensor) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x @ self.weight[expert].T for expert in range(3)])

    net = Experts()
    attach(net, LoRAConfig(rank=2, target_modules=[], target_parameters=["weight"]))
    stir(net)
    started, finish = threading.Event(), threading.Event()
    thread = threading.Thread(target=evaluate_within, args=(net, x, started, finish))
    thread.start()
    started.wait(5)
    output = net(x)
    finish.set()
    thread.join()
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(net))


def evaluate_within(net: nn.Module, x: Tensor, started: threading.Event, finish: threading.Event) -> None:
    """Compute without gradients, and wait within the forward pass."""

    class Waiting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
            if function is torch.stack:
                started.set()
                finish.wait(5)
            return function(*arguments, **(keywords or {}))

    with torch.no_grad(), Waiting():
        net(x)


def test_deleting_the_active_adapters_activates_the_next_ones(x: Tensor) -> None:
    net = adapted("first", "second")
    set_adapter(net, "second")
    second = net(x)
    set_adapter(net, "first")
    delete_adapter(net, "first")
    assert adapter_names(net) == ["second"]
    assert torch.equal(net(x), second)
    assert {weight.adapter_name for weight in adapted_weights(net)} == {"second"}


def test_the_last_of_two_bare_contexts_brings_the_adapters_back(x: Tensor) -> None:
    net = adapted()
    want, outer, inner = net(x), bare(net), bare(net.rnn)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert type(net.rnn) is nn.GRU
    assert isinstance(net.first, nn.Linear)
    assert type(net.first) is not nn.Linear
    inner.__exit__(None, None, None)
    assert torch.equal(net(x), want)


@pytest.mark.parametrize("layer", [nn.MultiheadAttention(8, 2), nn.LSTM(8, 8), nn.GRUCell(8, 8)])
def test_a_weight_that_is_read_several_times_is_formed_once_in_a_forward_pass(
    layer: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach(layer, LoRAConfig(rank=2, exclude_modules=["out_proj"]))
    formed, delta_weight = list[Adapter](), Adapter.delta_weight

    def count(adapter: Adapter, weight: Tensor) -> Tensor:
        formed.append(adapter)
        return delta_weight(adapter, weight)

    monkeypatch.setattr(Adapter, "delta_weight", count)
    inputs = torch.randn(3, 2, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    attention = isinstance(layer, nn.MultiheadAttention)
    layer(*inputs) if attention else layer(inputs[0][0] if isinstance(layer, nn.GRUCell) else inputs[0])
    assert len(formed) == len(adapted_weights(layer))


class Reduced(nn.Linear):
    """A layer that says itself how it is copied."""

    def __reduce__(self) -> tuple[object, ...]:
        return rebuild, (self.in_features, self.out_features, self.weight.detach(), self.bias.detach())


def rebuild(in_features: int, out_features: int, weight: Tensor, bias: Tensor) -> Reduced:
    layer = Reduced(in_features, out_features)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_layer_that_says_itself_how_it_is_copied_keeps_its_adapters(
    copied: Callable[[nn.Module], nn.Module], x: Tensor
) -> None:
    net = nn.Sequential(Reduced(8, 4))
    base = net(x)
    attach(net, LoRAConfig(rank=2))
    stir(net, 1)
    want, clone = net(x), copied(net)
    assert torch.equal(clone(x), want)
    assert torch.equal(net(x), want)
    detach(clone)
    assert torch.equal(clone(x), base)
    assert type(clone[0]) is Reduced


@pytest.mark.parametrize("use_dora", [False, True])
def test_replicas_of_data_parallel_compute_with_the_adapters_and_reach_their_gradients(
    use_dora: bool, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broadcast(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[tensor.detach() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", broadcast)
    net = Net()
    attach(net, LoRAConfig(rank=2, use_dora=use_dora))
    stir(net, 0.5)
    want, before = net(x), whole(net)
    first, second = replicate.replicate(net, [0, 1])
    for replica in (first, second):
        assert torch.allclose(replica(x), want, atol=1e-6)
    first(x).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(net))
    assert same(whole(net), before)
    assert torch.equal(net(x), want)
