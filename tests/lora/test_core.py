"""The core of `lora/`: what a reader has to read, and what a plain `attach` runs."""

from __future__ import annotations

import ast
import sys
from types import FrameType
from typing import Any

from torch import nn

from lora_lightning.lora import LoRAConfig, attach
from tests.conftest import ROOT

LORA = ROOT / "lora_lightning" / "lora"
CORE = [LORA / name for name in ("config.py", "layers.py", "freeze.py", "model.py")]


def test_the_core_imports_nothing_else_of_the_package() -> None:
    names = {f"lora_lightning.lora.{path.stem}" for path in CORE} | {"lora_lightning.wording"}
    for path in CORE:
        for node in ast.walk(ast.parse(path.read_text())):
            imported = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            assert all(name in names for name in imported if name.startswith(("lora_lightning", "lightning", "."))), (
                path
            )


def test_a_plain_attach_runs_the_core_alone() -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    config = LoRAConfig(rank=2, target_modules=["0", "3"])
    files: set[str] = set()

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        files.add(frame.f_code.co_filename)

    sys.settrace(trace)
    try:
        attach(net, config)
    finally:
        sys.settrace(None)
    ours = {file for file in files if file.startswith(str(ROOT / "lora_lightning"))}
    assert ours
    assert ours <= {str(path) for path in CORE}
