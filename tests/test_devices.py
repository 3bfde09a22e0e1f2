"""Several devices: processes on the CPU, as Lightning's `ddp` starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_lightning.data.image_folder import SAMPLE as PICTURES

SAMPLE = ["--data.source", "sample"]


def run(*words: str, devices: int = 1) -> Path:
    """One command in processes of their own; its log folder."""
    strategy = ["--trainer.strategy", "ddp", "--trainer.devices", str(devices)] if devices > 1 else []
    before = set(Path("logs").glob("*/version_*"))
    outcome = subprocess.run(
        [sys.executable, "-m", "lora_lightning", *words, "--trainer.accelerator", "cpu", *strategy],
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
    words = ["test", "-c", "configs/pretrain.yaml", *SAMPLE, "--data.eval_batch_size", "100"]
    alone, together = (json.loads((run(*words, devices=n) / "confusion.json").read_text()) for n in (1, 3))
    assert together["samples"] == 1000  # which 3 does not divide
    assert together["model"]["matrix"] == alone["model"]["matrix"]


@pytest.mark.usefixtures("workspace")
def test_two_devices_overfit_the_batches_that_they_are_asked_to() -> None:
    words = [*SAMPLE, "--trainer.overfit_batches", "2", "--trainer.max_epochs", "3", "--trainer.max_steps", "-1"]
    (path,) = run("fit", "-c", "configs/pretrain.yaml", *words, devices=2).glob("checkpoints/*.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 6


@pytest.mark.usefixtures("workspace")
def test_two_devices_train_the_adapters_that_one_trains_with_batches_twice_as_large() -> None:
    run("fit", "-c", "configs/pretrain.yaml", *SAMPLE)
    states = []
    for devices, batch_size in ((1, 80), (2, 40)):
        words = [*SAMPLE, "--data.batch_size", str(batch_size), "--trainer.max_steps", "10"]
        folder = run("fit", "-c", "configs/adapt.yaml", *words, devices=devices)
        (path,) = folder.glob("checkpoints/*.ckpt")
        states.append(torch.load(path, weights_only=True)["state_dict"])
        assert [file.name for file in folder.glob("adapter*")] == ["adapter"]
    alone, together = states
    assert len(alone) == 6
    assert any(value.abs().max() > 0.01 for value in alone.values())
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("workspace")
def test_two_devices_predict_every_image_once() -> None:
    words = [
        "predict",
        "-c",
        "configs/goldfish_lora.yaml",
        "--model.backbone.name",
        "timm/test_resnet",
        "--adapter",
        "none",
    ]
    alone, together = ((run(*words, devices=n) / "predictions.csv").read_text() for n in (1, 2))
    assert [line.split(",")[:3] for line in together.splitlines()] == [
        line.split(",")[:3] for line in alone.splitlines()
    ]
    assert len(alone.splitlines()) == 6
    one = run(*words, "--data.predict", str(PICTURES / "goldfish" / "two.jpg"), devices=2)
    assert len((one / "predictions.csv").read_text().splitlines()) == 2


SCRIPT = """
import json, sys, torch
from pathlib import Path
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lora_lightning import Classifier, ConfusionReport, LoRAFinetuning, MNISTDataModule, RichBoyNet

size, devices, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

class Few(MNISTDataModule):
    def setup(self, stage):
        super().setup(stage)
        self._val = self._val.select(torch.arange(size))
        self._test = self._test.select(torch.arange(size))

torch.manual_seed(0)
report, data = ConfusionReport(verbose=False), Few(source="sample", batch_size=200, eval_batch_size=2, digits=[9])
model = Classifier(RichBoyNet(16, 16))
trainer = Trainer(
    accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=1, enable_progress_bar=False,
    enable_model_summary=False, logger=CSVLogger(f"{out}_logs"), log_every_n_steps=1, enable_checkpointing=False,
    callbacks=[LoRAFinetuning(rank=1), report], num_sanity_val_steps=0,
)
trainer.fit(model, datamodule=data)
fitted = {key: float(value) for key, value in trainer.callback_metrics.items()}
trainer.test(model, datamodule=data, verbose=False)
tested = {key: float(value) for key, value in trainer.callback_metrics.items()}
if trainer.is_global_zero:
    matrices = [report.report.model.matrix.tolist(), report.report.base.matrix.tolist()]
    Path(out).write_text(json.dumps({"matrices": matrices, "fitted": fitted, "tested": tested}))
"""


@pytest.mark.parametrize(("size", "devices"), [(1, 3), (5, 2)])
def test_counts_and_means_are_exact_also_when_a_device_has_no_batch(size: int, devices: int, workspace: Path) -> None:
    Path("run.py").write_text(SCRIPT)
    for number in (1, devices):
        command = [sys.executable, "run.py", str(size), str(number), f"{number}.json"]
        outcome = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False
        )
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    alone, together = (json.loads(Path(f"{number}.json").read_text()) for number in (1, devices))
    assert sum(map(sum, together["matrices"][0])) == sum(map(sum, together["matrices"][1])) == size
    assert together["matrices"][1] == alone["matrices"][1]  # the base, which training leaves alone
    assert together["tested"].keys() == alone["tested"].keys()
    assert {key for key in alone["fitted"] if key.startswith("val/")} <= together["fitted"].keys()


@pytest.mark.usefixtures("workspace")
def test_two_nodes_by_torchrun_train_what_two_processes_of_one_train() -> None:
    run("fit", "-c", "configs/pretrain.yaml", *SAMPLE)
    words = ["fit", "-c", "configs/adapt.yaml", "--trainer.max_steps", "5", "--trainer.strategy", "ddp"]
    together = run(*words, devices=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
                *("--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", str(port)),
                *("-m", "lora_lightning", *words, *SAMPLE, "--trainer.num_nodes", "2", "--trainer.devices", "1"),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
            node.communicate()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    (apart,) = set(Path("logs/adapt").glob("version_*")) - {together}
    states = [
        torch.load(next(folder.glob("checkpoints/*.ckpt")), weights_only=True)["state_dict"]
        for folder in (together, apart)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.usefixtures("workspace")
def test_a_command_leaves_the_process_group_so_that_no_process_aborts_at_its_exit() -> None:
    words = ["test", "-c", "configs/pretrain.yaml", *SAMPLE, "--trainer.strategy", "ddp", "--trainer.devices", "2"]
    Path("command.py").write_text(f"""
import os
from pathlib import Path
from torch import distributed
from lora_lightning.cli.main import main
code = main({words} + ["--trainer.accelerator", "cpu"])
rank = os.environ.get("LOCAL_RANK", "0")
Path("outcome_" + rank).write_text(str(code) + " " + str(distributed.is_initialized()))
""")
    outcome = subprocess.run(
        [sys.executable, "command.py"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert [Path(f"outcome_{rank}").read_text() for rank in range(2)] == ["0 False", "0 False"]
