"""What the benchmarks of training steps share: the methods, and how they are measured.

The methods take turns within one process, in changing order; a ratio is the median of the ratios within the same turn.
The floor is what no adapter training can do without: the forward pass and the gradients of the inputs, through the
frozen network, without any adapter or optimizer. All others have PyTorch's fused Adam; "floor + Adam" is the floor
followed by its step on tensors of the adapters' shapes, which shows what of a ratio is the optimizer's; "floor + flat
Adam" is the floor followed by its step on one tensor of as many elements, which shows what one buffer for all adapters
could save at most.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning import LoRAConfig
from lora_lightning.lora import adapter_parameters, attach

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

SECONDS_A_TURN = 0.05
Step = Callable[[], Any]


def attached(net: nn.Module, rank: int, targets: str | list[str] = "all") -> nn.Module:
    """The network with this project's adapters."""
    attach(net, LoRAConfig(rank=rank, target_modules=targets))
    return net


def with_peft(net: nn.Module, rank: int, targets: str | list[str] = "all") -> nn.Module:
    """The network with PEFT's adapters, and norm layers that stay in evaluation mode, as frozen ones should."""
    if targets == "all":
        targets = [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    net = peft.get_peft_model(net, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    return net


def training_step(net: nn.Module, images: Tensor, targets: Tensor) -> Step:
    """Forward, backward and optimizer."""
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(images), targets).backward()
        optimizer.step()

    return step


def floor_step(net: nn.Module, images: Tensor, targets: Tensor) -> Step:
    """Forward, and the gradients of the inputs alone."""
    net.requires_grad_(False).eval()
    images = images.clone().requires_grad_()

    def step() -> None:
        images.grad = None
        F.cross_entropy(net(images), targets).backward()

    return step


def floor_and_adam_step(net: nn.Module, images: Tensor, targets: Tensor, adapted: nn.Module, *, flat: bool) -> Step:
    """The floor, and Adam on the adapters' shapes, or on one flat tensor, with gradients that stay the same."""
    floor = floor_step(net, images, targets)
    parameters = [nn.Parameter(torch.randn_like(parameter)) for parameter in adapter_parameters(adapted)]
    if flat:
        parameters = [nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def step() -> None:
        floor()
        optimizer.step()

    return step


def steps_of(net: nn.Module, images: Tensor, targets: Tensor, rank: int, layers: str | list[str]) -> dict[str, Step]:
    """PEFT, this project, and the two floors."""
    ours = attached(copy.deepcopy(net), rank, layers)
    return {
        "PEFT": training_step(with_peft(copy.deepcopy(net), rank, layers), images, targets),
        "this project": training_step(ours, images, targets),
        "floor + Adam": floor_and_adam_step(copy.deepcopy(net), images, targets, ours, flat=False),
        "floor + flat Adam": floor_and_adam_step(copy.deepcopy(net), images, targets, ours, flat=True),
        "floor": floor_step(copy.deepcopy(net), images, targets),
    }


def measure(steps: dict[str, Step], turns: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each, and the median ratios to each other one in the same turn."""
    for step in steps.values():
        step()
    fastest = next(reversed(steps.values()))
    began = time.perf_counter()
    for _ in range(3):
        fastest()
    repeats = max(1, round(SECONDS_A_TURN / ((time.perf_counter() - began) / 3)))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns):
        names = list(steps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            step = steps[name]
            step()
            began = time.perf_counter()
            for _ in range(repeats):
                step()
            taken[name].append((time.perf_counter() - began) / repeats * 1e3)
    return {
        name: {"milliseconds": statistics.median(times)}
        | {f"x {other}": statistics.median(a / b for a, b in zip(times, taken[other], strict=True)) for other in taken}
        for name, times in taken.items()
    }
