"""What `lora/` imports: pure PyTorch, and the same whichever file is imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

LORA = ROOT / "lora_lightning" / "lora"
FILES = sorted(path.stem for path in LORA.glob("*.py") if path.stem != "__init__")

FIRST = """
import importlib, sys, types
for name, folder in (("lora_lightning", sys.argv[1]), ("lora_lightning.lora", sys.argv[1] + "/lora")):
    package = types.ModuleType(name)
    package.__path__ = [folder]  # so that no __init__.py runs
    sys.modules[name] = package
first = importlib.import_module("lora_lightning.lora." + sys.argv[2])
import torch
from torch import nn
from lora_lightning.lora.adaptation import adapted_weights, attach
from lora_lightning.lora.config import LoRAConfig
net = nn.ModuleDict({
    "linear": nn.Linear(8, 6), "conv": nn.Conv2d(3, 4, 3), "lstm": nn.LSTM(4, 5), "norm": nn.BatchNorm1d(6),
    "table": nn.Embedding(7, 4), "attention": nn.MultiheadAttention(8, 2),
})
torch.manual_seed(0)
attach(net, LoRAConfig(rank=2, use_dora=True))
print([(weight.name, type(weight.kind).__name__, type(weight.layer).__name__) for weight in adapted_weights(net)])
print(type(net["norm"]).__name__, sum(float(value.abs().sum()) for value in net.parameters()) > 0)
print(sorted({"lightning", "matplotlib", "torchvision"} & sys.modules.keys()))
"""


@pytest.fixture(scope="module")
def expected() -> str:
    return run("layers")


def run(first: str) -> str:
    words = [sys.executable, "-c", FIRST, str(Path(LORA).parent), first]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("first", [pytest.param(name, marks=pytest.mark.slow) for name in FILES] + ["readers", "fused"])
def test_each_file_can_be_imported_first_and_nothing_depends_on_the_order(first: str, expected: str) -> None:
    assert run(first) == expected


def test_it_needs_torch_alone(expected: str) -> None:
    assert expected.splitlines()[-1] == "[]"
    assert "('attention.in_proj_weight', 'AttentionKind', 'LoRAMultiheadAttention')" in expected
