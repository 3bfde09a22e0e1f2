"""Losses that the authors of "The Expressive Power of Low-Rank Adaptation" publish (https://arxiv.org/abs/2310.17513).

The README of https://github.com/UW-Madison-Lee-Lab/Expressive_Power_of_LoRA has commands with their outputs. The
networks here draw their values in the order of its commit 1aeb7c3, which added these outputs, with its seed 123. The
adapters are ours. Later commits draw in another order, and also train biases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning import LoRAConfig, lora

SEED, WIDTH, HEADS, RANK, BATCH = 123, 8, 2, 2, 256
Draw = Callable[[int], Tensor]
Start = dict[str, Tensor]
"""Initial values of A by name of the adapted weight."""


def start_of_adapter() -> Tensor:
    """Draw what an adapter there starts from: two matrices that are not used, and then A."""
    torch.randn(WIDTH, RANK)
    torch.randn(WIDTH, RANK)
    return nn.init.normal_(torch.empty(WIDTH, RANK), std=0.25).T


class Transformer(nn.Module):
    """One block of attention with square matrices for each head, and of two layers, and an output layer."""

    def __init__(self, starts: Start | None = None) -> None:
        super().__init__()
        names = [f"{kind}{head}" for head in range(HEADS) for kind in ("query", "key", "value", "output")]
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.randn(WIDTH, WIDTH)))
        if starts is not None:
            starts.update({name: start_of_adapter() for name in names})
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        if starts is not None:
            starts["second"] = start_of_adapter()
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)
        if starts is not None:
            starts["last"] = start_of_adapter()

    def forward(self, x: Tensor) -> Tensor:
        """Return an output of the shape of the input: (batch, width, length)."""
        attended = torch.zeros_like(x)
        for head in range(HEADS):
            query, key, value, output = (getattr(self, f"{kind}{head}") for kind in ("query", "key", "value", "output"))
            scores = (key @ x).mT @ (query @ x)
            attended = attended + output @ (value @ x) @ scores.softmax(1)
        return self.last(self.second(self.first(attended.mT).relu())).mT


def sequences(count: int) -> Tensor:
    return torch.randn(count, WIDTH, 10)


def vectors(count: int) -> Tensor:
    return torch.randn(count, WIDTH)


class Setting(NamedTuple):
    """A target, a network that is adapted to it, where its adapters start, and how inputs are drawn."""

    target: nn.Module
    net: nn.Module
    starts: Start
    draw: Draw


def transformers() -> Setting:
    torch.manual_seed(SEED)
    target, starts = Transformer(), Start()
    return Setting(target, Transformer(starts), starts, sequences)


def mlps() -> Setting:
    """A target of one layer, and a network of two, whose difference has equal singular values."""
    torch.manual_seed(SEED)
    target = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
    starts = {"0": start_of_adapter(), "2": start_of_adapter()}
    with torch.no_grad():
        product = net[2].weight @ net[0].weight
        mean = torch.linalg.svdvals(target[0].weight - product).mean()
        target[0].weight.copy_(product + mean * torch.eye(WIDTH))
    return Setting(target, net, starts, vectors)


def train(setting: Setting, steps: int, rate: float, decay: float = 0.0, share: float = 0.0) -> None:
    """Train what requires gradients with Adam, and stop early at this share of the first loss."""
    torch.manual_seed(SEED)
    trained = [value for value in setting.net.parameters() if value.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=rate, weight_decay=decay)
    first = None
    for _ in range(steps):
        x = setting.draw(BATCH)
        with torch.no_grad():
            y = setting.target(x)
        loss = F.mse_loss(setting.net(x), y)
        first = loss.item() if first is None else first
        if loss.item() < first * share:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def loss_on(setting: Setting, count: int) -> float:
    """Return the loss on inputs that are drawn now."""
    x = setting.draw(count)
    return F.mse_loss(setting.net(x), setting.target(x)).item()


def adapt(setting: Setting) -> None:
    names = [name for name in setting.starts if name not in ("second", "last")]
    lora.attach(setting.net, LoRAConfig(rank=RANK, target_modules=["second", "last"], target_parameters=names))
    with torch.no_grad():
        for weight in lora.adapted_weights(setting.net):
            weight.adapter.lora_A.copy_(setting.starts[weight.name])


@pytest.mark.slow
@pytest.mark.parametrize(("pretrained", "validated", "tested"), [(False, 2.1712, 2.2730), (True, 1.8559, 1.9348)])
def test_a_transformer_is_adapted_as_well_as_they_say(pretrained: bool, validated: float, tested: float) -> None:
    setting = transformers()
    if pretrained:
        train(setting, 1000, rate=2e-3, share=1 / 3)
    adapt(setting)
    train(setting, 800, rate=1e-3, decay=0.01)
    assert loss_on(setting, BATCH) == pytest.approx(validated, abs=5e-4)
    assert loss_on(setting, 5000) == pytest.approx(tested, abs=5e-4)


@pytest.mark.slow
def test_the_final_layer_alone_gets_as_close_as_they_say() -> None:
    setting = mlps()
    train(setting, 1000, rate=1e-3, share=1 / 3)
    setting.net[0].requires_grad_(False)
    train(setting, 5000, rate=1e-4, decay=0.01)
    assert loss_on(setting, BATCH) == pytest.approx(0.0554, abs=5e-4)
    torch.manual_seed(SEED)
    assert loss_on(setting, 5000) == pytest.approx(0.0545, abs=5e-4)
