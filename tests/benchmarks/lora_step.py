"""Milliseconds a training step of the over-sized MLP, by method, batch size and rank.

The methods take turns within one process; a ratio is the median of the ratios to the floor measured in the same turn. The
floor is what no adapter training can do without: the forward pass and the gradients of the inputs, through the frozen
network, without any adapter or optimizer. All others have PyTorch's fused Adam; "floor + Adam" is the floor followed by
its step on tensors of the adapters' shapes, which shows what of a ratio is the optimizer's.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lora_lightning import LoRAConfig, RichBoyNet, attach
from lora_lightning.cpu import tune_for_cpu

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

BATCH_SIZES = (10, 64, 256, 1024)
RANKS = (1, 8)
SECONDS_A_TURN = 0.05
TURNS = 60

Step = Callable[[], Any]


class Parametrization(nn.Module):
    """W + s B A in place of W, formed at every step, as the seed notebook does."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view(weight.shape)


def parametrized(net: RichBoyNet, rank: int) -> nn.Module:
    """The network with every weight parametrized and everything else frozen."""
    net.requires_grad_(False)
    for layer in (net.linear1, net.linear2, net.linear3):
        parametrize.register_parametrization(layer, "weight", Parametrization(layer.weight, rank))
    return net


def attached(net: RichBoyNet, rank: int) -> nn.Module:
    """The network with this project's adapters."""
    attach(net, LoRAConfig(rank=rank))
    return net


def with_peft(net: RichBoyNet, rank: int) -> nn.Module:
    """The network with PEFT's adapters."""
    targets = ["linear1", "linear2", "linear3"]
    return peft.get_peft_model(net, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))


def training_step(net: nn.Module, images: Tensor, digits: Tensor) -> Step:
    """Forward, backward and optimizer."""
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(images), digits).backward()
        optimizer.step()

    return step


def floor_step(net: nn.Module, images: Tensor, digits: Tensor) -> Step:
    """Forward, and the gradients of the inputs alone."""
    net.requires_grad_(False)
    images = images.clone().requires_grad_()

    def step() -> None:
        images.grad = None
        F.cross_entropy(net(images), digits).backward()

    return step


def floor_and_adam_step(net: nn.Module, images: Tensor, digits: Tensor, rank: int) -> Step:
    """The floor, and Adam on the adapters' shapes with gradients that stay the same."""
    floor = floor_step(net, images, digits)
    shapes = [shape for p in net.parameters() if p.dim() == 2 for shape in ((rank, p.shape[1]), (p.shape[0], rank))]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def step() -> None:
        floor()
        optimizer.step()

    return step


def measure(steps: dict[str, Step]) -> dict[str, dict[str, float]]:
    """Median milliseconds of each, and the median ratio to the floor of the same turn."""
    for step in steps.values():
        step()
    began = time.perf_counter()
    for _ in range(3):
        steps["floor"]()
    repeats = max(1, round(SECONDS_A_TURN / ((time.perf_counter() - began) / 3)))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(TURNS):
        names = list(steps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            step = steps[name]
            step()
            began = time.perf_counter()
            for _ in range(repeats):
                step()
            taken[name].append((time.perf_counter() - began) / repeats * 1e3)
    return {
        name: {
            "milliseconds": statistics.median(times),
            **{
                f"x {other}": statistics.median(a / b for a, b in zip(times, taken[other], strict=True))
                for other in ("floor", "PEFT", "parametrization")
            },
        }
        for name, times in taken.items()
    }


def run() -> tuple[Table, list[dict[str, Any]]]:
    """Measures every batch size and rank."""
    tune_for_cpu()
    torch.manual_seed(0)
    net = RichBoyNet()
    numbers: list[dict[str, Any]] = []
    table = Table(title="A training step, ms (x the floor)", title_justify="left")
    columns = ("batch", "rank", "full", "param.", "PEFT", "ours", "floor + Adam", "floor", "x PEFT", "x param.")
    for column in columns:
        table.add_column(column, justify="right")
    for batch_size in BATCH_SIZES:
        images, digits = torch.randn(batch_size, 784), torch.randint(10, (batch_size,))
        for rank in RANKS:
            steps = {
                "full": training_step(copy.deepcopy(net), images, digits),
                "parametrization": training_step(parametrized(copy.deepcopy(net), rank), images, digits),
                "PEFT": training_step(with_peft(copy.deepcopy(net), rank), images, digits),
                "this project": training_step(attached(copy.deepcopy(net), rank), images, digits),
                "floor + Adam": floor_and_adam_step(copy.deepcopy(net), images, digits, rank),
                "floor": floor_step(copy.deepcopy(net), images, digits),
            }
            measured = measure(steps)
            numbers.append({"batch_size": batch_size, "rank": rank, "methods": measured})
            cells = [f"{m['milliseconds']:.2f} ({m['x floor']:.2f})" for m in measured.values()]
            ours = measured["this project"]
            table.add_row(
                str(batch_size), str(rank), *cells, f"{ours['x PEFT']:.2f}", f"{ours['x parametrization']:.2f}"
            )
    return table, numbers
