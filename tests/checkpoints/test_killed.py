"""Real processes, killed and asked to stop at any moment, and restarted by the same command with `--ckpt_path last`."""

from __future__ import annotations

import csv
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.benchmarks.kills import killed_training, places
from tests.conftest import ROOT
from tests.helpers import same
from tests.processes import Process

Run = Callable[..., tuple[int, str]]

CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: EPOCHS
  log_every_n_steps: 1
  enable_progress_bar: false
  logger:
    class_path: CSVLogger
    init_args: {save_dir: SAVE_DIR, name: run}
  callbacks:
    - class_path: lora_lightning.LoRAFinetuning
      init_args: {rank: 4, dropout: 0.2, base_checkpoint: logs/pretrain}
    - class_path: ModelCheckpoint
      init_args: {every_n_train_steps: SAVE_EVERY, save_last: true, filename: "{step}", save_on_exception: true}
model:
  class_path: lora_lightning.Classifier
  init_args:
    backbone: {class_path: lora_lightning.RichBoyNet}
    lr_scheduler: {class_path: lora_lightning.models.OneCycle}
data:
  class_path: lora_lightning.MNISTDataModule
  init_args: {source: sample, focus: [9], batch_size: 500}
"""


@pytest.fixture
def workplace(workspace: Path, a_base: Path) -> Path:
    """A folder with a base in it."""
    return workspace


def command(folder: Path, name: str, *words: str, epochs: int, save_every: int = 1) -> list[str]:
    values = {"SAVE_DIR": f"logs/{name}", "SAVE_EVERY": save_every, "EPOCHS": epochs}
    config = CONFIG
    for key, value in values.items():
        config = config.replace(key, str(value))
    (folder / f"{name}.yaml").write_text(config)
    return ["fit", "-c", f"{name}.yaml", *words]


def start(folder: Path, name: str, *words: str, epochs: int, save_every: int = 1) -> Process:
    words = tuple(command(folder, name, *words, epochs=epochs, save_every=save_every))
    return Process("-m", "lora_lightning", *words, folder=folder)


def saved(folder: Path) -> set[tuple[Path, int]]:
    found = set()
    for path in folder.rglob("*.ckpt"):
        try:
            found.add((path, path.stat().st_mtime_ns))
        except FileNotFoundError:  # replaced by a newer one
            continue
    return found


def wait_for_a_save(process: Process, folder: Path) -> None:
    before, began = saved(folder), time.monotonic()
    while saved(folder) <= before and not process.has_ended:
        assert time.monotonic() - began < 600, "no checkpoint in ten minutes"
        time.sleep(0.01)


def outcome(folder: Path) -> dict[str, Any]:
    """What the last run left: its checkpoint, its adapters, and the metrics of its last validation."""
    version = max(folder.glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    checkpoint = torch.load(version / "checkpoints" / "last.ckpt", weights_only=True)
    with (version / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/loss")]
    return {
        "adapters": load_file(version / "adapter" / "adapter_model.safetensors"),
        **{key: checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")},
        "metrics": {key: value for key, value in rows[-1].items() if key.startswith("val/")},
    }


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "epochs"), [(3, 13)])
def test_a_run_that_was_killed_again_and_again_ends_as_one_that_was_not(
    workplace: Path, kills: int, epochs: int
) -> None:
    undisturbed = start(workplace, "whole", epochs=epochs)
    output = undisturbed.finish()
    assert undisturbed.code == 0, output
    choose, killed = random.Random(kills), 0
    while killed < kills:
        process = start(workplace, "killed", "--ckpt_path", "last", epochs=epochs)
        wait_for_a_save(process, workplace / "logs" / "killed")
        time.sleep(choose.uniform(0, 0.4))
        process.send(signal.SIGKILL)
        output = process.finish()
        if process.code == 0:
            break  # it was done before
        assert process.code == -signal.SIGKILL, output
        for path, _ in saved(workplace / "logs" / "killed"):
            torch.load(path, weights_only=True)  # whole, each of them
        killed += 1
    assert killed == kills, f"the run was over after {killed} kills: make it longer"
    process = start(workplace, "killed", "--ckpt_path", "last", epochs=epochs)
    output = process.finish()
    assert process.code == 0, output
    assert "Checkpoint: " in output
    whole, resumed = outcome(workplace / "logs/whole/run"), outcome(workplace / "logs/killed/run")
    assert {key: same(whole[key], resumed[key]) for key in whole} == dict.fromkeys(whole, True)


class Shipped:
    """Runs of `configs/adapt.yaml` as it is, or of a copy.

    The file as it is ends a run after `max_steps`. A copy ends it earlier, or after `max_epochs`.
    """

    def __init__(self, folder: Path, name: str, ends_by: str, devices: int) -> None:
        self.folder, self.logs = folder, folder / "logs" / name / "adapt"
        text = (ROOT / "configs/adapt.yaml").read_text().replace("save_dir: logs", f"save_dir: logs/{name}")
        if ends_by == "max_epochs":
            text = text.replace("max_epochs: 20", "max_epochs: 9").replace("  max_steps: 600\n", "")
            assert "max_steps" not in text
        (folder / f"{name}.yaml").write_text(text)
        self.devices = devices
        self.command = ["fit", "-c", f"{name}.yaml", "--data.source", "sample"]
        self.command += ["--trainer.accelerator", "cpu", "--trainer.devices", str(devices), "--ckpt_path", "last"]
        if devices > 1:
            self.command += ["--trainer.strategy", "ddp"]

    def start(self) -> Process:
        return Process("-m", "lora_lightning", *self.command, folder=self.folder, devices=self.devices)

    def finish(self, run: Run) -> dict[str, Any]:
        """Runs it to its end: in this process if it is the only one, which saves importing everything."""
        if self.devices == 1:
            code, output = run(*self.command)
        else:
            process = self.start()
            output = process.finish()
            code = process.code
        assert code == 0, output
        version = self.versions()[-1]
        path = max((version / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        checkpoint = torch.load(path, weights_only=True)
        keys = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
        return {
            "adapters": load_file(version / "adapter" / "adapter_model.safetensors"),
            **{key: checkpoint[key] for key in keys},
        }

    def versions(self) -> list[Path]:
        found = [path for path in self.logs.glob("version_*") if (path / "config.yaml").is_file()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("version_")))

    def kill(self, after_a_save: bool, later: float) -> bool:
        """Starts it and kills it, once it has saved or else once it has begun; whether it was still running."""
        process, before, began = self.start(), self.versions(), time.monotonic()
        if after_a_save:
            wait_for_a_save(process, self.logs)
        while self.versions() == before and not process.has_ended:
            assert time.monotonic() - began < 600, "no log folder in ten minutes"
            time.sleep(0.005)
        time.sleep(later)
        running = not process.has_ended
        process.send(signal.SIGKILL)
        process.finish()
        return running


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(("ends_by", "kills"), [("max_steps", 3), ("max_epochs", 2)])
def test_the_shipped_config_killed_again_and_again_ends_as_if_it_was_not(
    run: Run, workplace: Path, ends_by: str, devices: int, kills: int
) -> None:
    expected = Shipped(workplace, "whole", ends_by, devices).finish(run)
    if devices == 1 and ends_by != "max_epochs":
        assert expected["global_step"] == 600
    killed, choose = Shipped(workplace, "killed", ends_by, devices), random.Random(kills)
    running = [killed.kill(number % 3 == 0, choose.uniform(0, 0.1)) for number in range(kills)]
    assert all(running), f"the run was over before it was killed {kills} times: {running}"
    found = killed.finish(run)
    assert {key: same(expected[key], found[key]) for key in expected} == dict.fromkeys(expected, True)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="SIGINT"),
        pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_asked_to_stop_does_so_with_a_checkpoint_and_one_line(
    run: Run, workplace: Path, number: signal.Signals
) -> None:
    settings: dict[str, int] = {"epochs": 6, "save_every": 10}
    code, output = run(*command(workplace, "whole", **settings))
    assert code == 0, output
    whole = outcome(workplace / "logs/whole/run")
    process = start(workplace, number.name, **settings)
    folder = workplace / "logs" / number.name
    wait_for_a_save(process, folder)
    time.sleep(0.1)
    process.send(number)
    output = process.finish()
    assert process.code == 1, output
    assert "Traceback" not in output
    assert output.strip().splitlines()[-1] == (
        "lora-lightning: interrupted. All files written so far are kept. --ckpt_path last resumes from there."
    )
    (path,) = {path for path, _ in saved(folder) if path.name == "last.ckpt"}
    assert 10 <= torch.load(path, weights_only=True)["global_step"] < whole["global_step"]
    code, output = run(*command(workplace, number.name, "--ckpt_path", "last", **settings))
    assert code == 0, output
    resumed = outcome(folder / "run")
    assert {key: same(whole[key], resumed[key]) for key in whole} == dict.fromkeys(whole, True)


def test_last_without_a_checkpoint_begins_anew_and_says_so(run: Run, workplace: Path) -> None:
    words = ("-c", "configs/adapt.yaml", "--data.source", "sample", "--trainer.max_steps", "3", "--ckpt_path", "last")
    code, output = run("fit", *words)
    assert code == 0, output
    assert "starting from the beginning." in output
    code, output = run("fit", *words)
    assert code == 0, output
    assert "Checkpoint: logs/adapt/version_0/checkpoints" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["all at once", "accumulated, clipped", "plain shuffled loader", "monitor, new folder", "two gloo processes"],
)
def test_a_module_of_ones_own_that_is_killed_goes_on_as_if_it_was_not(name: str, tmp_path: Path) -> None:
    choose = random.Random(name)
    assert killed_training(name, places(1, choose), choose, tmp_path) == []
