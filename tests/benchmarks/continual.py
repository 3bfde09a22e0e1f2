"""Digits learned in turn: adapters on frozen ones, one adapter that is trained on, and one trained on all digits.

A base that has seen 1,000 images of all digits is adapted to five tasks of two digits each, 0 and 1 first, with one
epoch of each. All numbers of the protocol stand here and were chosen before the first run: Adam, a learning rate of
0.001, batches of 64, rank 4.
"""

from __future__ import annotations

import copy
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning import LoRAConfig, MNISTDataModule, RichBoyNet
from lora_lightning.lora import adapter_parameters, attach, set_adapter

SEEDS = (31, 32, 33)
TASKS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
RATE, BATCH, RANK = 1e-3, 64, 4
IMAGES_OF_BASE, EPOCHS_OF_BASE = 1_000, 5


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return normalized images and digits to train on, and those to test."""
    module = MNISTDataModule(Path(os.environ.get("LORA_LIGHTNING_DATA", "data")), source="full")
    module.setup("fit")
    found = []
    for loader in (module.train_dataloader(), module.test_dataloader()):
        batches = [module.on_after_batch_transfer(batch, 0) for batch in loader]
        found.append((torch.cat([images for images, _ in batches]), torch.cat([targets for _, targets in batches])))
    return found[0], found[1]


def train(net: nn.Module, images: Tensor, targets: Tensor, epochs: int = 1) -> None:
    """Train what requires gradients for some epochs, with an optimizer of its own."""
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=RATE, fused=True)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), targets[batch]).backward()
            optimizer.step()


@torch.no_grad()
def recalls(net: nn.Module, images: Tensor, targets: Tensor) -> list[float]:
    """Return the recall of each digit in percent."""
    found = net(images).argmax(1)
    return [100 * float((found[targets == digit] == digit).float().mean()) for digit in range(10)]


def one_seed(seed: int) -> dict[str, list[list[float]]]:
    """Return the recalls after each task, by method: those of the base first, and of the last one at the end only."""
    torch.manual_seed(seed)
    (images, targets), test = digits()
    net, few = RichBoyNet(), torch.randperm(len(images))[:IMAGES_OF_BASE]
    train(net, images[few], targets[few], EPOCHS_OF_BASE)
    base = recalls(net, *test)
    stack, single, together = (copy.deepcopy(net) for _ in range(3))
    found = {"one adapter per task, earlier ones frozen": [base], "one adapter, trained on": [base]}
    attach(single, LoRAConfig(rank=RANK))
    names: list[str] = []
    for task in TASKS:
        chosen = (targets == task[0]) | (targets == task[1])
        names.append(f"digits_{task[0]}_{task[1]}")
        attach(stack, LoRAConfig(rank=RANK), names[-1])
        set_adapter(stack, names, trained=names[-1])
        for each, method in zip((stack, single), found, strict=True):
            train(each, images[chosen], targets[chosen])
            found[method].append(recalls(each, *test))
    attach(together, LoRAConfig(rank=RANK))
    train(together, images, targets)
    found["one adapter, all digits at once"] = [base, recalls(together, *test)]
    assert len(adapter_parameters(stack)) == len(adapter_parameters(single))
    return found


def run() -> tuple[Table, list[dict[str, Any]]]:
    """Measure all seeds."""
    measured = [one_seed(seed) for seed in SEEDS]
    table = Table(title=f"Recall of digits in %, mean of {len(SEEDS)} seeds", title_justify="left")
    for column in ("method", "after", "its two digits", "digits so far", "all ten digits", "of seeds"):
        table.add_column(column, justify="left" if column in ("method", "after") else "right")
    base = [statistics.fmean(found["one adapter, trained on"][0]) for found in measured]
    table.add_row("base", "", "", "", f"{statistics.fmean(base):.1f}", _each(base))
    for method in measured[0]:
        runs = [found[method] for found in measured]
        for number in range(1, len(runs[0])):
            is_last = len(runs[0]) == 2
            seen = range(10) if is_last else range(2 * number)
            columns = [
                [statistics.fmean(run[number][digit] for digit in shown) for run in runs]
                for shown in (TASKS[number - 1], seen, range(10))
            ]
            cells = [f"{statistics.fmean(column):.1f}" for column in columns]
            when = "all digits" if is_last else f"{TASKS[number - 1][0]} and {TASKS[number - 1][1]}"
            table.add_row(method, when, "" if is_last else cells[0], cells[1], cells[2], _each(columns[2]))
    return table, [{"seed": seed, "recalls": found} for seed, found in zip(SEEDS, measured, strict=True)]


def _each(values: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)
