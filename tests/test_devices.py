"""Several devices: processes on the CPU, as Lightning's `ddp` starts them."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_lightning.data.image_folder import SAMPLE as PICTURES
from tests import processes
from tests.conftest import ROOT
from tests.processes import free_ports

Run = Callable[..., tuple[int, str]]
SAMPLE = ["--data.source", "sample"]
CPU = ["--trainer.accelerator", "cpu"]
PREDICT = [
    "predict",
    "-c",
    "configs/goldfish_lora.yaml",
    "--model.backbone.name",
    "timm/test_resnet",
    "--adapter",
    "none",
]
ONE_IMAGE = ["--data.predict", str(PICTURES / "goldfish" / "two.jpg")]
OVERFIT = ["fit", "-c", "configs/pretrain.yaml", *SAMPLE, "--trainer.overfit_batches", "2"]
OVERFIT += ["--trainer.max_epochs", "3", "--trainer.max_steps", "-1", "--trainer.logger.name", "overfit"]
ADAPT = ["fit", "-c", "configs/adapt.yaml", *SAMPLE, "--trainer.max_steps", "10"]

COUNT = """
import json, torch
from pathlib import Path
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lora_lightning import Classifier, ConfusionReport, LoRAFinetuning, MNISTDataModule, RichBoyNet

def count(size, devices, out):
    class Few(MNISTDataModule):
        def setup(self, stage):
            super().setup(stage)
            self._val = self._val.select(torch.arange(size))
            self._test = self._test.select(torch.arange(size))

    torch.manual_seed(0)
    report, data = ConfusionReport(verbose=False), Few(source="sample", batch_size=200, eval_batch_size=2, digits=[9])
    model = Classifier(RichBoyNet(16, 16))
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=1,
        enable_progress_bar=False, enable_model_summary=False, logger=CSVLogger(f"{out}_logs"), log_every_n_steps=1,
        enable_checkpointing=False, callbacks=[LoRAFinetuning(rank=1), report], num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule=data)
    fitted = {key: float(value) for key, value in trainer.callback_metrics.items()}
    trainer.test(model, datamodule=data, verbose=False)
    tested = {key: float(value) for key, value in trainer.callback_metrics.items()}
    if trainer.is_global_zero:
        matrices = [report.report.adapted.matrix.tolist(), report.report.base.matrix.tolist()]
        Path(out).write_text(json.dumps({"matrices": matrices, "fitted": fitted, "tested": tested}))
"""
COMMANDS = """
import os, sys
from torch import distributed
from lora_lightning.cli.main import main

# All processes run this.
outcomes = []
for port, words in json.loads(Path("commands.json").read_text()):
    os.environ["MASTER_PORT"] = str(port)
    before = set(Path("logs").glob("*/version_*"))
    code = main(words)
    new = sorted(map(str, set(Path("logs").glob("*/version_*")) - before))
    outcomes.append({"code": code, "initialized": distributed.is_initialized(), "new": new})
Path("outcome_" + os.environ.get("LOCAL_RANK", "0")).write_text(json.dumps(outcomes))
"""


def run_on(devices: int, folder: Path, *commands: list[str], code: str = "") -> list[Path]:
    """Run commands one after the other in the same processes, which leave their group after each; their log folders."""
    words = [[*command, *CPU, "--trainer.strategy", "ddp", "--trainer.devices", str(devices)] for command in commands]
    pairs = list(zip(free_ports(len(words)), words, strict=True))
    (folder / "commands.json").write_text(json.dumps(pairs))
    (folder / "commands.py").write_text(COUNT + COMMANDS + code)
    processes.run("commands.py", folder=folder, devices=devices)
    for rank in range(devices):
        for each in json.loads((folder / f"outcome_{rank}").read_text()):
            assert (each["code"], each["initialized"]) == (0, False)
    folders = [folder / new for each in json.loads((folder / "outcome_0").read_text()) for new in each["new"]]
    assert len(folders) == len(commands)
    return folders


def alone(run: Run, *words: str) -> Path:
    """The log folder of a command in this process."""
    before = set(Path("logs").glob("*/version_*"))
    code, text = run(*words, *CPU)
    assert code == 0, text
    (folder,) = set(Path("logs").glob("*/version_*")) - before
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, short_runs: Path) -> dict[str, Path]:
    """The log folders of several commands on two devices: starting the processes takes longer than the commands."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(short_runs / "pretrain", folder / "logs" / "pretrain")
    commands = {"adapt": [*ADAPT, "--data.batch_size", "40"], "predict": PREDICT}
    folders = run_on(2, folder, *commands.values(), code="count(5, 2, '2.json')\n")
    return dict(zip(commands, folders, strict=True)) | {"count": folder}


@pytest.fixture(scope="module")
def more_of_two(tmp_path_factory: pytest.TempPathFactory, short_runs: Path) -> dict[str, Path]:
    """The log folders of further commands."""
    folder = tmp_path_factory.mktemp("more of two")
    (folder / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(short_runs / "pretrain", folder / "logs" / "pretrain")
    commands = {
        "overfit": OVERFIT,
        "eva": [*ADAPT, "--data.batch_size", "40", "--lora.init", "eva", "--lora.rank", "3"],
        "predict one": [*PREDICT, *ONE_IMAGE],
    }
    return dict(zip(commands, run_on(2, folder, *commands.values()), strict=True))


@pytest.mark.slow
def test_three_devices_count_every_digit_once(run: Run, a_base: Path, workspace: Path) -> None:
    words = ["test", "-c", "configs/pretrain.yaml", *SAMPLE, "--data.eval_batch_size", "100"]
    folders = alone(run, *words), *run_on(3, workspace, words)
    one, three = (json.loads((folder / "confusion.json").read_text()) for folder in folders)
    assert three["samples"] == 2000  # which 3 does not divide
    assert three["model"]["matrix"] == one["model"]["matrix"]


@pytest.mark.slow
def test_two_devices_overfit_the_batches_that_they_are_asked_to(more_of_two: dict[str, Path]) -> None:
    (path,) = more_of_two["overfit"].glob("checkpoints/*.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 6


def test_two_devices_train_the_adapters_that_one_trains_with_batches_twice_as_large(
    run: Run, a_base: Path, two: dict[str, Path]
) -> None:
    states = []
    for folder in (alone(run, *ADAPT, "--data.batch_size", "80"), two["adapt"]):
        (path,) = folder.glob("checkpoints/*.ckpt")
        states.append(torch.load(path, weights_only=True)["state_dict"])
        assert [file.name for file in folder.glob("adapter*")] == ["adapter"]
    one, together = states
    assert len(one) == 6
    assert any(value.abs().max() > 0.01 for value in one.values())
    for key, value in one.items():
        torch.testing.assert_close(together[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_devices_get_the_ranks_that_the_first_one_finds_in_its_batches(more_of_two: dict[str, Path]) -> None:
    (path,) = more_of_two["eva"].glob("checkpoints/*.ckpt")
    found = torch.load(path, weights_only=True)
    ranks = [len(value) for key, value in found["state_dict"].items() if key.endswith("lora_A")]
    assert sum(ranks) == 9
    assert len(set(ranks)) > 1
    assert found["lora_lightning"]["configs"]["default"]["rank_pattern"]


def test_two_devices_predict_every_image_once(run: Run, two: dict[str, Path]) -> None:
    one, together = (predicted(folder) for folder in (alone(run, *PREDICT), two["predict"]))
    assert together == one
    assert len(one) == 6


@pytest.mark.slow
def test_two_devices_predict_one_image_once(more_of_two: dict[str, Path]) -> None:
    assert len(predicted(more_of_two["predict one"])) == 2


def predicted(folder: Path) -> list[list[str]]:
    """The header and the rows of the predictions, as far as they are the same on any number of devices."""
    return [line.split(",")[:3] for line in (folder / "predictions.csv").read_text().splitlines()]


def assert_exact(size: int, together: Path) -> None:
    """Compare with one device what several have counted and averaged."""
    Path("count.py").write_text(COUNT)
    runpy.run_path("count.py")["count"](size, 1, "1.json")
    one, several = (json.loads(path.read_text()) for path in (Path("1.json"), together))
    assert sum(map(sum, several["matrices"][0])) == sum(map(sum, several["matrices"][1])) == size
    assert several["matrices"][1] == one["matrices"][1]  # the base, which training leaves alone
    assert several["tested"].keys() == one["tested"].keys()
    assert {key for key in one["fitted"] if key.startswith("val/")} <= several["fitted"].keys()


@pytest.mark.usefixtures("workspace")
def test_counts_and_means_are_exact_where_two_devices_have_batches_of_different_numbers(two: dict[str, Path]) -> None:
    assert_exact(5, two["count"] / "2.json")


@pytest.mark.slow
def test_counts_and_means_are_exact_also_when_two_of_three_devices_have_no_batch(workspace: Path) -> None:
    Path("run.py").write_text(f"{COUNT}\ncount(1, 3, '3.json')\n")
    processes.run("run.py", folder=workspace, devices=3)
    assert_exact(1, Path("3.json"))


@pytest.mark.slow
def test_two_nodes_by_torchrun_train_what_two_processes_of_one_train(a_base: Path, workspace: Path) -> None:
    (together,) = run_on(2, workspace, ADAPT)
    together = together.relative_to(workspace)
    words = [*ADAPT, *CPU, "--trainer.strategy", "ddp", "--trainer.num_nodes", "2", "--trainer.devices", "1"]
    (port,) = free_ports(1)
    nodes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
                *("--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", str(port)),
                *("-m", "lora_lightning", *words),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=900)[0] for node in nodes]
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
