"""The wheel works where a user installs it: outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

HANGS = 900  # seconds, many times what a command takes
SMALL = ("--data.source", "sample", "--trainer.max_steps", "5", "--trainer.accelerator", "cpu")


def run(folder: Path, *words: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_installed_wheel_repairs_writes_examples_trains_and_tests(tmp_path: Path) -> None:
    wheels, installed, work = tmp_path / "wheels", tmp_path / "installed", tmp_path / "work"
    work.mkdir()
    run(tmp_path, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), str(ROOT))
    (wheel,) = wheels.glob("lora_lightning-*.whl")
    run(tmp_path, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(installed), str(wheel))

    def lora_lightning(*words: str) -> str:
        return run(work, "-m", "lora_lightning", *words, PYTHONPATH=str(installed))

    where = run(work, "-c", "import lora_lightning; print(lora_lightning.__file__)", PYTHONPATH=str(installed))
    assert Path(where.strip()).is_relative_to(installed)
    assert "Verdict: " in lora_lightning("repair", "--source", "sample", "--accelerator", "cpu")
    lora_lightning("init", "mnist")
    lora_lightning("fit", "--config", "configs/pretrain.yaml", *SMALL)
    lora_lightning("fit", "--config", "configs/adapt.yaml", *SMALL)
    lora_lightning("test", "--config", "configs/adapt.yaml", *SMALL[:2], "--ckpt_path", "logs/adapt")
    assert list(work.glob("logs/adapt/version_*/report*.html"))
    assert not list(installed.rglob("draw_goldfish.py"))
