"""What the tests share: where things are, and small models and data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from lora_lightning.cli import main

ROOT = Path(__file__).parents[1]


def same(first: Any, second: Any) -> bool:
    """Whether two nested structures of tensors and values are equal, bit for bit."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second) or str(first) == str(second) == "nan"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the working directory, with the project's configs in it."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    return tmp_path


@pytest.fixture
def run(
    workspace: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Callable[..., tuple[int, str]]:
    """Runs the command line in this process; returns the exit code and all that was printed."""

    def run_command(*words: str) -> tuple[int, str]:
        with caplog.at_level("INFO"):
            code = main(list(words))
        captured, logged = capsys.readouterr(), caplog.text
        caplog.clear()
        return code, captured.out + captured.err + logged

    return run_command


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A quiet trainer on the CPU that logs below the test's folder."""

    def make(*callbacks: Callback, **arguments: object) -> Trainer:
        settings: dict[str, object] = {
            "accelerator": "cpu",
            "logger": TensorBoardLogger(tmp_path / "logs", name="test"),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "max_epochs": 20,
            "callbacks": list(callbacks),
        }
        return Trainer(**(settings | arguments))

    return make


@pytest.fixture
def mnist_dir() -> Path:
    """Where the whole MNIST is, for the tests that want it."""
    folder = os.environ.get("LORA_LIGHTNING_DATA")
    if not folder:
        # It is not shipped, and can't be downloaded everywhere; .ci/run looks for it, and the embedded sample has its own tests.
        pytest.skip("LORA_LIGHTNING_DATA does not say where the whole MNIST is")
    return (ROOT / folder).resolve()


@pytest.fixture
def mlp() -> nn.Sequential:
    """A small network with a norm layer in it: layers `0` and `3` are linear."""
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
