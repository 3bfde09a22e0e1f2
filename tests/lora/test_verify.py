"""The probe: what it names, and what it leaves as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora_lightning import LoRAConfig
from lora_lightning.lora import InertAdapterError, attach, disabled, verify_adapters


class Sneaky(nn.Module):
    """Takes its layers' weights by a way that nobody could foresee, or does not use them at all."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(4, 4)
        self.called = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.only_in_training = nn.Linear(4, 4)
        self.only_with_gradients = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        y = self.called(x @ dict(self.named_parameters())["read.weight"])
        if self.training:
            y = y + self.only_in_training(x)
        if torch.is_grad_enabled():
            y = y + self.only_with_gradients(x)
        return {"logits": [y]}


def test_every_inert_adapter_is_named_with_its_mode() -> None:
    net = Sneaky()
    attach(net, LoRAConfig(rank=2))
    with pytest.raises(InertAdapterError) as caught:
        verify_adapters(net, torch.randn(3, 4))
    message = str(caught.value)
    assert "'called'" not in message
    for expected in (
        "'read' (in training, evaluation)",
        "'unused' (in training, evaluation)",
        "'only_in_training' (in evaluation)",
        "'only_with_gradients' (in evaluation without gradients)",
    ):
        assert expected in message


def test_what_is_named_can_be_left_out_or_adapted_as_a_parameter() -> None:
    net = nn.ModuleDict({"sneaky": Sneaky()})
    net.forward = lambda x: net["sneaky"](x)
    attach(net, LoRAConfig(rank=2, target_modules=["called"]))
    verify_adapters(net, torch.randn(3, 4))


def test_the_module_is_left_as_it_was() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3), nn.BatchNorm1d(3))
    net[2].eval()
    attach(net, LoRAConfig(rank=2, modules_to_save=["4"]))
    net[3].lora_weight.default.lora_B.grad = torch.ones_like(net[3].lora_weight.default.lora_B)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    modes = [layer.training for layer in net.modules()]
    random = torch.get_rng_state()
    verify_adapters(net, torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())
    assert [layer.training for layer in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(net[3].lora_weight.default.lora_B.grad, torch.ones_like(net[3].lora_weight.default.lora_B))
    assert net[0].lora_weight.default.lora_B.grad is None


class Dead(nn.Module):
    """A layer whose units all sleep on every input that it gets, as long as nothing moves its weights far."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        nn.init.constant_(self.inner.bias, -1.0)
        nn.init.zeros_(self.inner.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).relu()


def test_a_gradient_of_zero_alone_makes_no_adapter_inert() -> None:
    net = Dead()
    attach(net, LoRAConfig(rank=2))
    verify_adapters(net, torch.randn(30, 4))


def test_a_head_that_begins_at_zero_hides_no_adapter() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    nn.init.zeros_(net[2].weight)
    attach(net, LoRAConfig(rank=2))
    verify_adapters(net, torch.randn(3, 4))


class DroppedAtRandom(nn.Module):
    """A branch that is left out of half of all training passes, as stochastic depth does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return y if self.training and torch.rand(()) < 0.5 else y + self.branch(y)


def test_a_branch_that_is_dropped_at_random_is_live() -> None:
    net = DroppedAtRandom()
    attach(net, LoRAConfig(rank=2))
    verify_adapters(net, torch.randn(3, 4))


def test_a_disabled_or_missing_adapter_can_not_be_verified() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="has no adapters to verify"):
        verify_adapters(net, torch.randn(3, 4))
    attach(net, LoRAConfig(rank=2))
    with disabled(net), pytest.raises(ValueError, match="adapters of this Sequential are disabled"):
        verify_adapters(net, torch.randn(3, 4))
