"""VGG-19: what its adapters cost in memory and time, against full fine-tuning.

Each contender trains in a process of its own, whose largest resident size is taken.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.table import Table

from lora_lightning import LoRAConfig
from lora_lightning.lora import attach

LAST_TWO = ["classifier.3", "classifier.6"]
CONTENDERS: dict[str, LoRAConfig | None] = {
    "full fine-tuning": None,
    "adapters in all layers, rank 4": LoRAConfig(rank=4),
    "adapters in the linear layers, rank 4": LoRAConfig(rank=4, target_modules=["classifier.0", *LAST_TWO]),
    "adapters in the last two, rank 4": LoRAConfig(rank=4, target_modules=LAST_TWO),
    "bypass, rank 10": LoRAConfig(rank=10, target_modules=[], bypass=(150_528, 1_000)),
}
BATCH, STEPS, ROUNDS = 5, 4, 2
MEGABYTE = 1e6


def peak_resident() -> float:
    """This process's largest resident size, in megabytes.

    Not by `getrusage`, which on Linux begins with the size of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    kibibytes = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return kibibytes * 1024 / MEGABYTE


def train(name: str) -> dict[str, float]:
    """A few steps with Adam: the process's largest resident size in megabytes, and seconds a step."""
    torch.manual_seed(0)
    net = torchvision.models.vgg19()
    config = CONTENDERS[name]
    if config is not None:
        attach(net, config)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3, fused=True)
    images, targets = torch.randn(BATCH, 3, 224, 224), torch.ones(BATCH, dtype=torch.long)
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images), targets).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    parameters = sum(parameter.numel() for parameter in trained)
    return {"peak": peak_resident(), "seconds": statistics.median(seconds[1:]), "trained": parameters}


def run_memory() -> tuple[Table, Any]:
    """All contenders in turns, the least of two rounds each."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(ROUNDS):
        for name, outcomes in found.items():
            words = [sys.executable, "-m", "tests.benchmarks.vgg19", name]
            outcomes.append(json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout))
    least = {name: {key: min(each[key] for each in of) for key in of[0]} for name, of in found.items()}
    full = least["full fine-tuning"]
    table = Table(title=f"VGG-19, batch of {BATCH}, Adam", title_justify="left")
    for column in ("", "trained", "peak, MB", "less by, MB", "weight gradients and moments saved, MB", "s / step"):
        table.add_column(column, justify="right" if column else "left")
    for name, outcome in least.items():
        owed = 3 * 4 * (full["trained"] - outcome["trained"]) / MEGABYTE
        outcome |= {"less": full["peak"] - outcome["peak"], "owed": owed}
        numbers = (f"{outcome[key]:,.0f}" for key in ("trained", "peak", "less", "owed"))
        table.add_row(name, *numbers, f"{outcome['seconds']:.2f}")
    return table, least


if __name__ == "__main__":
    sys.stdout.write(json.dumps(train(sys.argv[1])))
