"""What a command says at its end, while it runs into a file, and when it cannot begin."""

from __future__ import annotations

import logging
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning_utilities.core import rank_zero

from lora_lightning import Classifier, MNISTDataModule, RichBoyNet
from lora_lightning.callbacks.loss_bar import LossBar
from lora_lightning.cli import progress_lines
from lora_lightning.cli.main import is_wanted
from tests.conftest import ROOT

Run = Callable[..., tuple[int, str]]
FIT = ("fit", "--config", "configs/pretrain.yaml", "--data.source", "sample", "--trainer.max_epochs", "1")


def closing(text: str) -> dict[str, str]:
    """The lines of the closing block by their names."""
    names = ("val", "test", "folder", "report", "files", "curves", "checkpoint", "adapter", "base", "next")
    lines = [line.partition(" ") for line in text.splitlines() if line.partition(" ")[0] in names]
    return {name: rest.strip() for name, _, rest in lines}


def test_a_run_ends_with_where_things_are_and_a_next_command_that_works(run: Run) -> None:
    status, text = run(*FIT)
    assert status == 0, text
    end = closing(text)
    assert Path(end["folder"]) == Path("logs/pretrain/version_0")
    assert Path(end["checkpoint"]).is_file()
    assert "accuracy" in end["val"]
    assert "recall" not in end["val"]
    command, *words = shlex.split(end["next"])
    assert command == "lora-lightning"
    status, text = run(*words)
    assert status == 0, text
    end = closing(text)
    assert "accuracy 0." in end["test"]
    files = [Path(end["folder"]) / name for name in end["files"].split(", ")]
    assert {file.name for file in files} == {
        "confusion.json",
        "confusion.csv",
        "confusion.png",
    }
    assert all(file.is_file() for file in files)


@pytest.mark.usefixtures("a_base")
def test_a_run_of_adapters_names_their_folder(run: Run) -> None:
    status, text = run("fit", "--config", "configs/adapt.yaml", *FIT[3:])
    assert status == 0, text
    assert (Path(closing(text)["adapter"]) / "adapter_config.json").is_file()
    assert closing(text)["base"].startswith("bitwise unchanged (SHA-256 ")


@pytest.mark.usefixtures("a_base_with_adapters")
def test_a_test_ends_with_the_command_that_merges_what_it_tested(run: Run) -> None:
    words = ("--config", "configs/adapt.yaml", "--data.source", "sample", "--ckpt_path", "logs/adapt")
    status, text = run("test", *words, "--weights_only", "false")
    assert status == 0, text
    assert "The adapters " in text
    assert text.count("report.html") == 1
    assert "Adapters: " in text
    assert "Trained: " not in text, "nothing trains in a test"
    command, *following = shlex.split(closing(text)["next"])
    assert (command, following) == ("lora-lightning", ["merge", *words])
    status, text = run(*following)
    assert status == 0, text
    assert Path("merged.ckpt").is_file()


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_nothing_is_advertised_printed_twice_or_zero(run: Run, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both packages log with the logger of the one that was imported last.
    monkeypatch.setattr(rank_zero, "log", logging.getLogger(f"{package}.utilities.rank_zero"))
    status, text = run(*FIT)
    assert status == 0, text
    for noise in ("Tip:", "litlogger", "FLOPs", "━"):
        assert noise not in text
    status, text = run("test", *FIT[1:5], "--ckpt_path", "logs/pretrain")
    assert status == 0, text
    assert "Test metric" not in text


def test_a_summary_that_is_asked_for_is_shown(run: Run) -> None:
    status, text = run(*FIT, "--trainer.enable_model_summary", "true")
    assert status == 0, text
    assert "RichBoyNet" in text


def test_a_pipe_gets_lines_in_place_of_a_bar(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_lines, "_SECONDS", 0)
    status, text = run(*FIT)
    assert status == 0, text
    assert "train: epoch 0, batch 1 of 22" in text
    assert "train/loss" in text
    status, text = run(*FIT, "--trainer.enable_progress_bar", "false")
    assert status == 0, text
    assert "train: epoch" not in text


def test_a_base_that_is_not_there_is_told_with_the_command_that_makes_it(run: Run) -> None:
    status, text = run("fit", "--config", "configs/adapt.yaml", "--data.source", "sample")
    assert status == 1
    assert "logs/pretrain does not exist" in text
    assert "lora-lightning fit --config configs/pretrain.yaml" in text
    assert "base_checkpoint" in text
    assert not Path("logs").exists(), "a failed start leaves no folder"


@pytest.mark.skipif(sys.platform == "darwin", reason="Macs have another accelerator")
def test_a_gpu_that_is_not_there_is_told_with_the_setting(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("lightning.fabric.accelerators.cuda.num_cuda_devices", lambda: 0)
    status, text = run(*FIT, "--trainer.accelerator", "cuda")
    assert status == 1
    assert "trainer.accelerator=cuda" in text
    assert "cpu" in text


@pytest.mark.parametrize("option", ["--config", "-c", "--config="])
def test_a_file_that_is_no_yaml_is_named_with_the_line(run: Run, option: str) -> None:
    Path("good.yaml").write_text("seed_everything: 0\n")
    Path("broken.yaml").write_text("trainer:\n  max_epochs: 1\n max_steps: 3\n")
    words = [f"{option}broken.yaml"] if option.endswith("=") else [option, "broken.yaml"]
    status, text = run("fit", "--config", "good.yaml", *words)
    assert status == 2
    assert "broken.yaml, line 3" in text
    assert "unicode string" not in text


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_it_imports_is_one_line() -> None:
    code = (
        "import sys; from lora_lightning.cli.start import main; print(1, flush=True); sys.exit(main(['fit', '--help']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.3)  # importing PyTorch takes longer than that
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    first, *others = errors.splitlines()  # the first line is printed before the imports
    assert first.endswith(": fit")
    assert (process.returncode, others) == (1, ["lora-lightning: interrupted before it started."])


@pytest.mark.slow  # a pseudo-terminal; what a pipe gets is tested below
def test_on_a_terminal_of_80_columns_no_bar_writes_over_the_end(workspace: Path) -> None:
    import fcntl
    import os
    import pty
    import struct
    import termios

    main_end, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    words = [sys.executable, "-m", "lora_lightning", *FIT, "--trainer.max_steps", "3"]
    environment = os.environ | {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(words, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    output = b""
    while True:
        try:
            output += (part := os.read(main_end, 65536))
        except OSError:  # how Linux says that nobody writes any more
            break
        if not part:
            break
    os.close(main_end)
    assert run.wait() == 0, output.decode(errors="replace")
    text = output.decode()
    assert "Epoch 0/0" in text, "there is a bar"
    end = text[text.rindex("folder     ") :]
    assert "\x1b[1A" not in end, "nothing goes up again"
    assert "next       lora-lightning test" in end


def test_a_bar_in_a_narrow_terminal_shows_the_training_loss_alone(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(max_epochs=1, limit_train_batches=2)
    model = Classifier(RichBoyNet(16, 8))
    trainer.fit(model, datamodule=MNISTDataModule(source="sample"))
    assert {"train/accuracy", "val/loss"} <= RichProgressBar().get_metrics(trainer, model).keys()
    assert LossBar().get_metrics(trainer, model) == {"loss": trainer.callback_metrics["train/loss"].item()}


@pytest.mark.parametrize(("is_terminal", "expected"), [(True, False), (False, True)])
def test_a_remark_at_the_end_of_fit_is_not_printed_into_a_bar(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, expected: bool
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    record = logging.LogRecord("any", logging.INFO, "", 0, "`Trainer.fit` stopped: `max_epochs=1` reached.", None, None)
    assert is_wanted(record) is expected
