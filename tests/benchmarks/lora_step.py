"""Milliseconds a training step of two MLPs, by method, batch size and rank; how they are measured says `steps.py`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_lightning import RichBoyNet
from lora_lightning.cli.cpu import tune_for_cpu
from tests.benchmarks.steps import measure, steps_of, training_step

BATCH_SIZES = (10, 64, 256, 1024)
RANKS = (1, 8, 16)
RICH, WIDE = "RichBoyNet", "4096 wide"
TURNS = {RICH: 24, WIDE: 8}


class Parametrization(nn.Module):
    """W + s B A in place of W, formed at every step, as the seed notebook does."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view(weight.shape)


def parametrized(net: nn.Module, rank: int) -> nn.Module:
    """The network with every weight parametrized and everything else frozen."""
    net.requires_grad_(False)
    for layer in [layer for layer in net.modules() if isinstance(layer, nn.Linear)]:
        parametrize.register_parametrization(layer, "weight", Parametrization(layer.weight, rank))
    return net


def wide() -> nn.Module:
    """784 -> 4096 -> 4096 -> 10."""
    return nn.Sequential(nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))


def run() -> tuple[Table, list[dict[str, Any]]]:
    """Measures both networks at every batch size and rank their last layer allows."""
    tune_for_cpu()
    torch.manual_seed(0)
    numbers: list[dict[str, Any]] = []
    table = Table(title="A training step, ms", title_justify="left")
    for column in (
        "network",
        "batch",
        "rank",
        "full",
        "param.",
        "PEFT",
        "ours",
        "floor",
        "x PEFT",
        "x param.",
        "x floor",
    ):
        table.add_column(column, justify="right")
    for column in ("floor + Adam, x floor", "floor + flat Adam, x floor"):
        table.add_column(column, justify="right")
    for name, net in {RICH: RichBoyNet(), WIDE: wide()}.items():
        last = [key for key, layer in net.named_modules() if isinstance(layer, nn.Linear)][-1]
        for batch_size in BATCH_SIZES:
            images, digits = torch.randn(batch_size, 784), torch.randint(10, (batch_size,))
            for rank in RANKS:
                # A rank of 16 is more than the last layer, of 10 classes, has.
                targets = [
                    key
                    for key, layer in net.named_modules()
                    if isinstance(layer, nn.Linear) and (rank <= 10 or key != last)
                ]
                steps = {
                    "full": training_step(copy.deepcopy(net), images, digits),
                    "parametrization": training_step(parametrized(copy.deepcopy(net), rank), images, digits),
                } | steps_of(net, images, digits, rank, targets)
                if name == WIDE:
                    del steps["full"], steps["parametrization"]
                measured = measure(steps, TURNS[name])
                numbers.append({"network": name, "batch_size": batch_size, "rank": rank, "methods": measured})
                ours = measured["this project"]
                ms = [
                    f"{measured[method]['milliseconds']:.2f}" if method in measured else ""
                    for method in ("full", "parametrization", "PEFT", "this project", "floor")
                ]
                ratios = [
                    f"{ours[key]:.2f}" if key in ours else "" for key in ("x PEFT", "x parametrization", "x floor")
                ]
                adam = [f"{measured[key]['x floor']:.2f}" for key in ("floor + Adam", "floor + flat Adam")]
                table.add_row(name, str(batch_size), str(rank), *ms, *ratios, *adam)
    return table, numbers
