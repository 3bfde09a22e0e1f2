"""Training steps of a convolutional network and of transformer blocks, and what disabled and merged adapters cost."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import torch
import torchvision
from rich.table import Table
from torch import Tensor, nn

from lora_lightning import RichBoyNet
from lora_lightning.cli.cpu import tune_for_cpu
from lora_lightning.lora import disabled, merged
from tests.benchmarks.steps import Step, attached, measure, steps_of, training_step

TURNS = 15


class Blocks(nn.Module):
    """Two encoder blocks of a ViT-B/16, over 197 tokens, and a head."""

    def __init__(self) -> None:
        super().__init__()
        vit = torchvision.models.vit_b_16(num_classes=10)
        self.layers = vit.encoder.layers[:2]
        self.head = nn.Linear(768, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(tokens)[:, 0])


MLP = ["mlp.0", "mlp.3"]


def steps() -> tuple[Table, list[dict[str, Any]]]:
    """ResNet-18 at rank 16, on images of CIFAR's size, and blocks of a ViT at rank 8."""
    convolutions = [
        name for name, layer in torchvision.models.resnet18().named_modules() if isinstance(layer, nn.Conv2d)
    ]
    cases = {
        "ResNet-18, 32 x 32, rank 16": (torchvision.models.resnet18(num_classes=10), (3, 32, 32), 16, convolutions),
        "ViT-B/16 blocks, rank 8, MLP": (Blocks(), (197, 768), 8, MLP),
        "ViT-B/16 blocks, rank 8, attention too": (Blocks(), (197, 768), 8, [*MLP, "self_attention"]),
    }
    table = Table(title="A training step, ms", title_justify="left")
    for column in ("network", "batch", "full", "PEFT", "ours", "floor", "x full", "x PEFT", "x floor", "PEFT x full"):
        table.add_column(column, justify="right")
    numbers: list[dict[str, Any]] = []
    for name, (net, shape, rank, targets) in cases.items():
        for batch_size in (16, 32, 64) if len(shape) == 3 else (4, 16):
            inputs, classes = torch.randn(batch_size, *shape), torch.randint(10, (batch_size,))
            each = {"full": training_step(copy.deepcopy(net), inputs, classes)} | steps_of(
                net, inputs, classes, rank, targets
            )
            measured = measure(each, TURNS)
            numbers.append({"network": name, "batch_size": batch_size, "methods": measured})
            ms = [f"{measured[key]['milliseconds']:.1f}" for key in ("full", "PEFT", "this project", "floor")]
            ratios = [f"{measured['this project'][key]:.2f}" for key in ("x full", "x PEFT", "x floor")]
            table.add_row(name, str(batch_size), *ms, *ratios, f"{measured['PEFT']['x full']:.2f}")
    return table, numbers


def idle() -> tuple[Table, list[dict[str, Any]]]:
    """A forward pass without gradients: of the plain network, and with adapters disabled, merged, and in use."""
    table = Table(title="A forward pass, ms", title_justify="left")
    for column in ("network", "batch", "plain", "disabled, x plain", "merged, x plain", "in use, x plain"):
        table.add_column(column, justify="right")
    numbers: list[dict[str, Any]] = []
    cases = {
        ("RichBoyNet, rank 1", 10): (RichBoyNet(), torch.randn(10, 784), 1),
        ("RichBoyNet, rank 8", 256): (RichBoyNet(), torch.randn(256, 784), 8),
        ("ResNet-18, rank 8", 16): (torchvision.models.resnet18(num_classes=10), torch.randn(16, 3, 32, 32), 8),
        ("ViT-B/16 blocks, rank 8", 4): (Blocks(), torch.randn(4, 197, 768), 8),
    }
    with torch.no_grad(), ExitStack() as stack:
        for (name, batch_size), (net, inputs, rank) in cases.items():
            net.eval()
            nets = {key: attached(copy.deepcopy(net), rank).eval() for key in ("in use", "merged", "disabled")}
            stack.enter_context(merged(nets["merged"]))
            stack.enter_context(disabled(nets["disabled"]))

            def forward(net: nn.Module, inputs: Tensor = inputs) -> Step:
                return lambda: net(inputs)

            measured = measure({key: forward(each) for key, each in (nets | {"plain": net}).items()}, 2 * TURNS)
            numbers.append({"network": name, "batch_size": batch_size, "methods": measured})
            ratios = [f"{measured[key]['x plain']:.2f}" for key in ("disabled", "merged", "in use")]
            table.add_row(name, str(batch_size), f"{measured['plain']['milliseconds']:.2f}", *ratios)
    return table, numbers


def run(part: str) -> tuple[Table, list[dict[str, Any]]]:
    """One of the two tables."""
    tune_for_cpu()
    torch.manual_seed(0)
    return {"networks": steps, "idle": idle}[part]()
