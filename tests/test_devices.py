"""Several devices: processes on the CPU, as Lightning's `ddp` starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SAMPLE = ["--data.source", "sample", "--trainer.accelerator", "cpu"]


def run(*words: str, devices: int = 1) -> Path:
    """One command in processes of their own; its log folder."""
    strategy = ["--trainer.strategy", "ddp", "--trainer.devices", str(devices)] if devices > 1 else []
    before = set(Path("logs").glob("*/version_*"))
    outcome = subprocess.run(
        [sys.executable, "-m", "lora_lightning", *words, *SAMPLE, *strategy],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    (folder,) = set(Path("logs").glob("*/version_*")) - before
    return folder


@pytest.mark.usefixtures("workspace")
def test_three_devices_count_every_digit_once() -> None:
    words = ["test", "-c", "configs/pretrain.yaml", "--data.eval_batch_size", "100"]
    alone, together = (json.loads((run(*words, devices=n) / "confusion.json").read_text()) for n in (1, 3))
    assert together["samples"] == 1000  # which 3 does not divide
    assert together["model"]["matrix"] == alone["model"]["matrix"]


@pytest.mark.usefixtures("workspace")
def test_two_devices_train_the_adapters_that_one_trains_with_batches_twice_as_large() -> None:
    run("fit", "-c", "configs/pretrain.yaml")
    states = []
    for devices, batch_size in ((1, 80), (2, 40)):
        words = ["--data.batch_size", str(batch_size), "--trainer.max_steps", "10"]
        folder = run("fit", "-c", "configs/adapt.yaml", *words, devices=devices)
        (path,) = folder.glob("checkpoints/*.ckpt")
        states.append(torch.load(path, weights_only=True)["state_dict"])
        assert [file.name for file in folder.glob("adapter*")] == ["adapter"]
    alone, together = states
    assert len(alone) == 6
    assert any(value.abs().max() > 0.01 for value in alone.values())
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, rtol=1e-3, atol=1e-5)
