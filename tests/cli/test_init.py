"""`lora-lightning init`: configurations to begin with."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_lightning.cli.init import TOPICS
from lora_lightning.cli.start import main
from tests.cli.test_start import answer
from tests.conftest import ROOT


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_writes_its_files_once_and_names_the_commands(
    topic: str, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", topic]) == 0
    _, names = TOPICS[topic]
    assert all(Path(name).is_file() for name in names)
    printed = capsys.readouterr().out
    for name in names:
        if name.endswith(".yaml"):
            assert f"fit  --config {name}" in printed.replace("fit     ", "fit  ").replace("fit --", "fit  --")
    Path(names[0]).write_text("mine")
    assert main(["init", topic]) == 2
    error = capsys.readouterr().err
    assert f"{', '.join(names)} {'exist and are' if len(names) > 1 else 'exists and is'} not changed." in error
    assert error.splitlines()[1:] == printed.splitlines()[1:]
    assert Path(names[0]).read_text() == "mine"


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").rglob("*.yaml"))],
    ids=lambda path: path.name,
)  # fmt: skip
def test_every_command_that_is_shown_can_be_pasted_into_every_shell(path: Path) -> None:
    """A shell such as zsh takes brackets without quotes for a pattern, and answers "no matches found"."""
    assert re.findall(r"--[\w.]+[ =]\[.*", path.read_text()) == []


def test_the_topics_are_listed_without_pytorch() -> None:
    for words, expected in (((), 0), (("--help",), 0), (("audio",), 2)):
        code, text, imported = answer("init", *words)
        assert (code, imported) == (expected, "[]")
        assert all(f"\n  {topic}" in text for topic in TOPICS)


@pytest.mark.filterwarnings("ignore::UserWarning")  # which end nothing in a process of its own either
@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["here", "processes"])
def test_the_commands_for_a_module_of_one_s_own_run_as_they_are_printed(
    empty: Path, capsys: pytest.CaptureFixture[str], processes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(empty)  # a process of its own finds the module without that
    monkeypatch.delitem(sys.modules, "own_module", raising=False)
    assert main(["init", "own"]) == 0
    commands = [line.strip() for line in capsys.readouterr().out.splitlines() if "--config" in line]
    assert len(commands) == 2
    for command in commands:
        program, *words = shlex.split(command)
        if not processes:
            assert main(words) == 0
            printed = capsys.readouterr().out
            continue
        script = Path(sys.executable).with_name(program)  # which is not in the folder of own_module.py
        done = subprocess.run([script, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        printed = done.stdout
    assert "errors" in printed
    assert list(Path("logs/own").rglob("confusion.json"))


def test_the_pair_for_mnist_runs(
    empty: Path, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty / "work").mkdir()
    monkeypatch.chdir(empty / "work")
    assert main(["init", "mnist"]) == 0
    assert Path("configs/pretrain.yaml").read_text() == (ROOT / "configs/pretrain.yaml").read_text()
    for name in ("pretrain", "adapt"):
        words = ("--config", f"configs/{name}.yaml", "--data.source", "sample", "--trainer.max_steps", "29")
        status, text = run("fit", *words)
        assert status == 0, text


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ("configs/adapt.yaml", "`lora-lightning init mnist` writes it"),
        ("configs/text.yaml", "`lora-lightning init text` writes it"),
        ("configs/notebook/digit9.yaml", f"The package contains it: {ROOT / 'configs/notebook/digit9.yaml'}"),
    ],
)
def test_an_example_that_is_not_in_the_working_directory_is_explained(
    config: str, hint: str, run: Callable[..., tuple[int, str]], workspace: Path
) -> None:
    (workspace / "configs").unlink()
    code, text = run("fit", "--config", config)
    assert code == 2
    assert f"File does not exist: '{workspace / config}'. {hint}" in text


def test_a_missing_file_of_one_s_own_is_named(run: Callable[..., tuple[int, str]], workspace: Path) -> None:
    for config in ("mine.yaml", "configs/mine.yaml"):
        code, text = run("fit", "--config", config)
        assert code == 2
        assert f"File does not exist: '{workspace / config}'\n" in text
