"""What `lora/` imports: pure PyTorch, and the same whichever file is imported first."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

LORA = ROOT / "lora_lightning" / "lora"
FILES = sorted(path.stem for path in LORA.glob("*.py") if path.stem != "__init__")

# One process imports PyTorch. Each of its forks imports another file first, and writes what it then does.
EACH_FIRST = """
import importlib, json, os, sys, traceback, types
import torch._dynamo
from torch import nn

def done_after(first, package):
    for name, folder in (("lora_lightning", package), ("lora_lightning.lora", package + "/lora")):
        empty = types.ModuleType(name)
        empty.__path__ = [folder]  # so that no __init__.py runs
        sys.modules[name] = empty
    importlib.import_module("lora_lightning.lora." + first)
    from lora_lightning.lora.adaptation import attach
    from lora_lightning.lora.record import adapted_weights
    from lora_lightning.lora.config import LoRAConfig
    net = nn.ModuleDict({
        "linear": nn.Linear(8, 6), "conv": nn.Conv2d(3, 4, 3), "lstm": nn.LSTM(4, 5), "norm": nn.BatchNorm1d(6),
        "table": nn.Embedding(7, 4), "attention": nn.MultiheadAttention(8, 2),
    })
    torch.manual_seed(0)
    attach(net, LoRAConfig(rank=2, use_dora=True))
    return [
        [(weight.name, type(weight.kind).__name__, type(weight.layer).__name__) for weight in adapted_weights(net)],
        type(net["norm"]).__name__,
        sum(float(value.abs().sum()) for value in net.parameters()) > 0,
        sorted({"lightning", "matplotlib", "torchvision"} & sys.modules.keys()),
    ]

package, *names = sys.argv[1:]
for name in names:
    if os.fork() == 0:
        try:
            found = done_after(name, package)
        except BaseException:
            found = traceback.format_exc()
        print(json.dumps([name, found]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def found() -> dict[str, object]:
    """What was done after each file was imported first."""
    words = [sys.executable, "-c", EACH_FIRST, str(LORA.parent), *FILES]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=True)
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("first", FILES)
def test_each_file_can_be_imported_first_and_nothing_depends_on_the_order(first: str, found: dict[str, object]) -> None:
    assert found[first] == found["layers"]


def test_it_needs_torch_alone(found: dict[str, object]) -> None:
    layers = found["layers"]
    assert isinstance(layers, list), layers
    weights, norm, holds_values, other_packages = layers
    assert ["attention.in_proj_weight", "AttentionKind", "LoRAMultiheadAttention"] in weights
    assert (norm, holds_values, other_packages) == ("FrozenBatchNorm1d", True, [])
