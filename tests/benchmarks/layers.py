"""How long attaching, saving, loading and merging take on networks of many layers, beside PEFT."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import peft
from rich.table import Table
from torch import nn

from lora_lightning import LoRAConfig, load_adapter, save_adapter
from lora_lightning.lora import attach, merge

SIZES = (1_000, 4_000, 10_000)
TURNS = 3
STEPS = ("attach", "save", "load", "merge")


class Layers(nn.Module):
    """That many small linear layers, in blocks of four."""

    def __init__(self, count: int) -> None:
        super().__init__()
        names = ("query", "key", "value", "output")
        self.blocks = nn.ModuleList(
            nn.ModuleDict({f"{name}_proj": nn.Linear(8, 8) for name in names}) for _ in range(count // 4)
        )


def run() -> tuple[Table, list[dict[str, Any]]]:
    """Seconds of each step, alternating, and their ratio."""
    warnings.simplefilter("ignore")
    table = Table(title="Many layers: seconds, median of turns", title_justify="left")
    for column in ("layers", "step", "PEFT", "ours", "ours / PEFT"):
        table.add_column(column, justify="right")
    numbers: list[dict[str, Any]] = []
    for count in SIZES:
        seconds: dict[str, dict[str, list[float]]] = {step: {"PEFT": [], "ours": []} for step in STEPS}
        for _ in range(TURNS):
            for who, turn in (("PEFT", _peft), ("ours", _ours)):
                with tempfile.TemporaryDirectory() as folder:
                    for step, taken in turn(count, Path(folder) / "adapter").items():
                        seconds[step][who].append(taken)
        for step, of in seconds.items():
            theirs, own = median(of["PEFT"]), median(of["ours"])
            numbers.append({"layers": count, "step": step, "seconds": of, "ratio": own / theirs})
            table.add_row(f"{count:,}", step, f"{theirs:.2f}", f"{own:.2f}", f"{own / theirs:.2f}")
    return table, numbers


def _timed(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _ours(count: int, folder: Path) -> dict[str, float]:
    net, other = Layers(count), Layers(count)
    other.load_state_dict(net.state_dict())
    return {
        "attach": _timed(lambda: attach(net, LoRAConfig(rank=2))),
        "save": _timed(lambda: save_adapter(net, folder)),
        "load": _timed(lambda: load_adapter(other, folder)),
        "merge": _timed(lambda: merge(net)),
    }


def _peft(count: int, folder: Path) -> dict[str, float]:
    config = peft.LoraConfig(r=2, target_modules=["query_proj", "key_proj", "value_proj", "output_proj"])
    nets: list[Any] = []
    base, other = Layers(count), Layers(count)
    return {
        "attach": _timed(lambda: nets.append(peft.get_peft_model(base, config))),
        "save": _timed(lambda: nets[0].save_pretrained(folder)),
        "load": _timed(lambda: peft.PeftModel.from_pretrained(other, folder)),
        "merge": _timed(lambda: nets[0].merge_and_unload()),
    }
