"""What the command line answers at once, and what an import brings along."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lora_lightning
from lora_lightning.cli.start import COMMANDS

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(lora_lightning.__file__).parents[1])}
HEAVY = "[name for name in ('torch', 'lightning', 'rich', 'matplotlib') if name in sys.modules]"


def answer(*words: str) -> tuple[int, str, str]:
    """Exit code, output and heavy imports of a command, in a process of its own."""
    code = f"import sys; from lora_lightning.cli.start import main; code = main({list(words)!r}); print({HEAVY}, code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    imported, _, exit_code = last.rpartition(" ")
    return int(exit_code), "\n".join(lines) + done.stderr, imported


@pytest.mark.smoke
def test_the_version_needs_no_pytorch() -> None:
    assert answer("--version") == (0, f"lora-lightning {lora_lightning.__version__}", "[]")


@pytest.mark.parametrize(("options", "found"), [((), True), (("-P",), False)])
def test_modules_in_the_working_directory_are_found_unless_python_is_told_not_to(
    options: tuple[str, ...], found: bool, tmp_path: Path
) -> None:
    code = "import sys; from lora_lightning.cli import start; start.main(); print(sys.path[-1])"
    command = [sys.executable, *options, "-c", code, "--version"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert (done.stdout.splitlines()[-1] == str(tmp_path)) is found


@pytest.mark.smoke
@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_help_names_all_commands_without_pytorch(words: tuple[str, ...]) -> None:
    code, text, imported = answer(*words)
    assert (code, imported) == (0, "[]")
    assert all(f"\n  {command}" in text for command in COMMANDS)
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize(
    ("word", "hint"),
    [("fitt", "there is no command 'fitt'. Did you mean 'fit'?"), ("go", "Expected one of init, fit, validate, test,")],
)
def test_an_unknown_command_is_answered_at_once(word: str, hint: str) -> None:
    code, text, imported = answer(word)
    assert (code, imported) == (2, "[]")
    assert hint in text


def test_every_command_is_known_to_what_runs_it() -> None:
    from lora_lightning.cli.lightning_cli import LoRALightningCLI

    assert set(COMMANDS) == {*LoRALightningCLI.subcommands(), "init", "merge", "export", "find-lr", "repair", "report"}


def test_the_lora_functions_need_pytorch_alone() -> None:
    others = "[name for name in ('lightning', 'torchvision', 'rich', 'peft') if name in sys.modules]"
    code = f"import sys, lora_lightning.lora; print({others})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_name_that_is_not_there_is_said() -> None:
    with pytest.raises(AttributeError, match="module 'lora_lightning' has no attribute 'Lora'"):
        lora_lightning.Lora  # noqa: B018
    assert set(lora_lightning.__all__) <= set(dir(lora_lightning))
