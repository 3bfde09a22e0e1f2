"""Milliseconds of a training step, here and in another checkout of this project.

The command is `python -m tests.benchmarks.versions ../other`.

Each checkout has a process of its own. They take turns, so that a load of the machine meets both. A ratio is the median
over the turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich import get_console
from rich.table import Table

_HERE = Path(__file__).parents[2]
_WORKER = """
import json, sys, time
import torch, torchvision
from torch import nn
from torch.nn import functional as F
from lora_lightning import RichBoyNet
from lora_lightning.lora import LoRAConfig, adapter_parameters, attach

torch.set_flush_denormal(True)

class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = torchvision.models.vit_b_16(num_classes=10).encoder.layers[:2], nn.Linear(768, 10)
    def forward(self, tokens):
        return self.head(self.layers(tokens)[:, 0])

NETS = {
    "RichBoyNet": (RichBoyNet, (784,)),
    "ResNet-18": (lambda: torchvision.models.resnet18(num_classes=10), (3, 32, 32)),
    "ViT-B/16 blocks": (Blocks, (197, 768)),
}
for line in sys.stdin:
    asked = json.loads(line)
    if "network" in asked:
        torch.manual_seed(0)
        make, shape = NETS[asked["network"]]
        net, x = make(), torch.randn(asked["batch"], *shape)
        y = torch.randint(10, (asked["batch"],))
        attach(net, LoRAConfig(rank=asked["rank"], target_modules=asked["targets"]))
        optimizer = torch.optim.Adam(adapter_parameters(net), lr=1e-3, fused=True)
    began = time.perf_counter()
    for _ in range(asked["steps"]):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
    took = (time.perf_counter() - began) / asked["steps"] * 1e3
    print(json.dumps({"ms": took, "loss": loss.item()}), flush=True)
"""
_MLP = r".*mlp\.[03]"
_TARGETS = {
    "all": "all",
    "two of three": "linear[12]",
    "convolutions": r"conv1|layer\d\.\d\.(conv\d|downsample\.0)",
    "MLP": _MLP,
    "MLP and attention": f"{_MLP}|.*self_attention",
}
_CASES = [
    *(
        ("RichBoyNet", batch, rank, "two of three" if rank > 10 else "all")
        for batch in (10, 64, 256)
        for rank in (1, 8, 16)
    ),
    *(("ResNet-18", batch, 16, "convolutions") for batch in (16, 64)),
    *(("ViT-B/16 blocks", 4, 8, layers) for layers in ("MLP", "MLP and attention")),
]


class Worker:
    """A process with the package of one checkout."""

    def __init__(self, checkout: Path) -> None:
        command = [sys.executable, "-W", "ignore", "-c", _WORKER]
        self.process = subprocess.Popen(command, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **what: Any) -> dict[str, float]:
        """Take some steps, and return the milliseconds of each and the last loss."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)
        found: dict[str, float] = json.loads(self.process.stdout.readline())
        return found


def run(other: Path, turns: int) -> Table:
    """Compare all cases."""
    table = Table(
        "network", "batch", "rank", "layers", "there, ms", "here, ms", "here / there", title="A training step"
    )
    workers = [Worker(checkout) for checkout in (other, _HERE)]
    ratios = []
    for network, batch, rank, layers in _CASES:
        case = {"network": network, "batch": batch, "rank": rank, "targets": _TARGETS[layers]}
        first = [worker.ask(**case, steps=3) for worker in workers]
        if first[0]["loss"] != first[1]["loss"]:
            print(f"{case}: losses differ, {first[0]['loss']} there and {first[1]['loss']} here")
        steps = max(1, round(100 / first[1]["ms"]))
        times: list[tuple[float, float]] = []
        for turn in range(turns):
            order = workers if turn % 2 else workers[::-1]
            found = {id(worker): worker.ask(steps=steps)["ms"] for worker in order}
            times.append((found[id(workers[0])], found[id(workers[1])]))
        ratios.append(statistics.median(here / there for there, here in times))
        there, here = (statistics.median(each) for each in zip(*times, strict=True))
        table.add_row(network, str(batch), str(rank), layers, f"{there:.2f}", f"{here:.2f}", f"{ratios[-1]:.3f}")
    for worker in workers:
        worker.process.stdin.close()  # type: ignore[union-attr]
        worker.process.wait()
    table.caption = f"median {statistics.median(ratios):.3f}, largest {max(ratios):.3f}"
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--turns", type=int, default=25)
    options = parser.parse_args()
    get_console().print(run(options.other, options.turns))
