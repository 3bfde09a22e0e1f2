"""The frozen prefix: found, skipped, and never otherwise than exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_lightning import LoRAConfig
from lora_lightning.feature_cache.cache import PrefixCache
from lora_lightning.lora import adapter_parameters, attach
from tests.helpers import same


class Residual(nn.Module):
    """Functional steps between modules, and a value that is used again later."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x)) + 1
        z = self.second(y).relu_() * 0.5
        return self.head((self.third(z) + y).flatten(1))


def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(32, 16), nn.Dropout(0.5),
        nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 5),
    )  # fmt: skip


class Counted:
    """Counts how many samples a module computes."""

    def __init__(self, module: nn.Module) -> None:
        self.samples = 0
        self._original = module.forward
        module.forward = self._forward  # type: ignore[method-assign]

    def _forward(self, x: Tensor) -> Tensor:
        self.samples += len(x)
        return self._original(x)


def train(net: nn.Module, batches: list[Tensor], *, cached: bool, epochs: int = 3, **arguments: Any) -> list[Tensor]:
    """A loss of the outputs, and what the adapters become."""
    torch.manual_seed(3)
    optimizer = torch.optim.Adam(adapter_parameters(net), lr=0.01)
    cache = PrefixCache(net, **arguments)
    cache.active = cached
    losses = []
    for _ in range(epochs):
        for batch in batches:
            loss = net(batch).logsumexp(1).mean() + net(batch).std()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    cache.remove()
    return [*losses, *(parameter.detach().clone() for parameter in adapter_parameters(net))]


NETS: dict[str, tuple[Callable[[], nn.Module], list[str], tuple[int, ...]]] = {
    "sequence with dropout": (vgg, ["6", "8"], (3, 4, 4)),
    "before the first adapter": (vgg, ["4"], (3, 4, 4)),
    "head alone": (Residual, ["head"], (3, 4, 4)),
    "inside a residual": (Residual, ["third"], (3, 4, 4)),
    "resnet18, a block": (lambda: torchvision.models.resnet18(num_classes=5), ["layer4.1.conv2"], (3, 32, 32)),
    "vision transformer": (
        lambda: torchvision.models.VisionTransformer(16, 4, 3, 2, 32, 64, dropout=0.1, num_classes=5),
        ["encoder.layers.encoder_layer_2.mlp.3", "heads.head"],
        (3, 16, 16),
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_training_is_bitwise_the_same(name: str) -> None:
    make, targets, size = NETS[name]
    net = make()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    attach(net, LoRAConfig(rank=2, target_modules=targets))
    batches = [torch.randn(4, *size) for _ in range(2)] + [torch.randn(3, *size)]
    expected = train(copy.deepcopy(net), batches, cached=False)
    found = train(net, batches, cached=True, samples=11)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_sample_is_computed_once_in_every_size_of_batch_whatever_the_order() -> None:
    net = vgg()
    attach(net, LoRAConfig(rank=2, target_modules=["8"]))
    samples = torch.randn(8, 3, 4, 4)
    train(net, [samples[:4]], cached=True, epochs=1)
    counted, cache = Counted(net[0]), PrefixCache(net)
    cache.active = True
    for batch in ([0, 1, 2, 3], [4, 5, 6, 7], [2, 7, 1, 4], [0, 3, 5, 6], [6, 6, 6, 6]):
        net(samples[batch])
        assert cache.prefix is not None
        seen = counted.samples
    assert [step.name for step in cache.prefix.kept] == ["4"]
    assert cache.prefix.ended_by == "'5', which draws random numbers"
    for batch in ([0, 1, 2, 3], [7, 6, 5, 4]):
        net(samples[batch])
    assert counted.samples == seen
    net(samples[:3])
    assert counted.samples > seen
    assert cache.bytes_per_sample == 16 * 4


def test_what_is_kept_is_what_the_rest_uses() -> None:
    for target, kept in {"head": ["first", "third"], "third": ["first", "second"], "second": ["first"]}.items():
        net = Residual()
        attach(net, LoRAConfig(rank=2, target_modules=[target]))
        cache = PrefixCache(net)
        cache.active = True
        net(torch.randn(2, 3, 4, 4))
        assert [step.name for step in cache.prefix.kept] == kept


def test_it_acts_on_training_calls_while_it_is_active_alone() -> None:
    net = vgg()
    attach(net, LoRAConfig(rank=2, target_modules=["8"]))
    batch = torch.randn(4, 3, 4, 4)
    cache = PrefixCache(net)
    cache.active = True
    net(batch)
    counted = Counted(net[0])
    net(batch)
    assert counted.samples == 0
    net.eval()
    net(batch)
    net.train()
    with torch.no_grad():
        net(batch)
    cache.active = False
    net(batch)
    assert counted.samples == 12
    cache.active = True
    net(batch)
    assert counted.samples == 12
    cache.remove()
    net(batch)
    assert counted.samples == 16


class TestRefused:
    @pytest.mark.parametrize(
        ("targets", "why"),
        [("all", r"'0', which trains"), (["0"], r"'0', which trains")],
    )
    def test_if_the_first_layer_trains(self, targets: Any, why: str) -> None:
        net = vgg()
        attach(net, LoRAConfig(rank=2, target_modules=targets))
        self.refused(net, rf"Sequential has no frozen prefix before {why}")

    def test_if_random_numbers_come_first(self) -> None:
        net = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(48, 5))
        attach(net, LoRAConfig(rank=2, target_modules=["3"]))
        self.refused(net, r"Sequential has no frozen prefix before '0', which draws random numbers")

    def test_if_random_numbers_come_first_outside_of_any_module(self) -> None:
        class Noisy(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x + torch.randn_like(x))

        net = Noisy(nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(48, 5))
        attach(net, LoRAConfig(rank=2, target_modules=["2"]))
        self.refused(net, r"Noisy has no frozen prefix before what is computed before '0', which draws random numbers")

    def test_if_a_norm_layer_still_learns(self) -> None:
        net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(48, 5))
        net[:3].requires_grad_(False)
        self.refused(net, r"Sequential has no frozen prefix before '0', which changes its buffers")

    def test_if_samples_mix(self) -> None:
        net = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(48, 5))
        attach(net, LoRAConfig(rank=2, target_modules=["2"]))
        self.refused(net, r"the output of '1' for a sample depends on the other samples in its batch")

    def test_if_the_backward_pass_computes_it_again(self) -> None:
        class Checkpointed(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return checkpoint(super().forward, self[0](x), use_reentrant=False)

        net = Checkpointed(nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(48, 5))
        attach(net, LoRAConfig(rank=2, target_modules=["2"]))
        self.refused(
            net, r"the backward pass of Checkpointed computes its frozen prefix again, as activation checkpointing"
        )

    def test_not_if_a_mask_comes_out_of_it_which_is_kept(self) -> None:
        class Positive(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.flatten(1) > 0

        class Masked(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return self[2](x.flatten(1).masked_fill(self[1](self[0](x)), 0.0))

        net = Masked(nn.Conv2d(3, 3, 1), Positive(), nn.Linear(48, 5))
        attach(net, LoRAConfig(rank=2, target_modules=["2"]))
        with torch.no_grad():
            net[0].bias.fill_(-10)  # nothing is masked: zeros in its place would not show
        cache = PrefixCache(net)
        cache.active = True
        net(torch.randn(4, 3, 4, 4))
        assert [step.name for step in cache.prefix.kept] == ["1"]

    def test_if_inputs_change(self) -> None:
        net = vgg()
        attach(net, LoRAConfig(rank=2, target_modules=["8"]))
        cache = PrefixCache(net, samples=6)
        cache.active = True
        net(torch.randn(4, 3, 4, 4))
        with pytest.warns(UserWarning, match="there are 8 different inputs, but only 6 training samples"):
            net(torch.randn(4, 3, 4, 4))
        counted = Counted(net[0])
        net(torch.randn(4, 3, 4, 4))
        assert counted.samples == 4

    def test_if_inputs_do_not_count_the_samples(self) -> None:
        net = nn.Bilinear(3, 3, 2)
        cache = PrefixCache(net)
        cache.active = True
        with (
            pytest.warns(UserWarning, match=r"first dimension of all inputs .* but their shapes are \(4, 3\), \(3,\)"),
            pytest.raises(RuntimeError, match="input"),  # of PyTorch, as without the cache
        ):
            net(torch.randn(4, 3), torch.randn(3))

    @staticmethod
    def refused(net: nn.Module, message: str) -> None:
        """The outputs and the state of the network are as without the cache."""
        other = copy.deepcopy(net)
        cache = PrefixCache(net)
        cache.active = True
        x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        random = torch.get_rng_state()
        with pytest.warns(UserWarning, match=f"Features of the frozen prefix are not stored: {message}"):
            found = [net(x), net(x)]
        after = torch.get_rng_state()
        torch.set_rng_state(random)
        assert all(torch.equal(other(x), each) for each in found)
        assert torch.equal(after, torch.get_rng_state())
        assert same(other.state_dict(), net.state_dict())
        assert not any("forward" in vars(module) for module in net.modules())


def test_a_norm_layer_that_learns_after_the_prefix_sees_each_batch_once() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1).requires_grad_(False), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 5))
    other = copy.deepcopy(net)
    cache = PrefixCache(net)
    cache.active = True
    batch = torch.randn(4, 3, 4, 4)
    for _ in range(3):
        assert torch.equal(net(batch), other(batch))
    assert cache.prefix is not None
    assert same(net.state_dict(), other.state_dict())


def test_features_come_back_in_the_same_order_in_memory() -> None:
    """On which kernels depend."""
    strides: list[tuple[int, ...]] = []

    class Seen(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            strides.append(input.stride())
            return super().forward(input.flatten(1))

    net = nn.Sequential(nn.Conv2d(3, 4, 1), Seen(64, 2)).to(memory_format=torch.channels_last)
    net[0].requires_grad_(False)
    cache = PrefixCache(net)
    cache.active = True
    batch = torch.randn(3, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        net(batch)
    assert set(strides) == {(64, 1, 16, 4)}
