"""What the README says is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import lora_lightning
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_two_commands_are_there() -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert "python -m venv .venv && .venv/bin/pip install -e . && .venv/bin/lora-lightning repair" in commands
    assert 'python -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/pytest' in commands


@pytest.mark.parametrize("code", [block for block in blocks("python") if "Trainer" not in block])
def test_the_pure_pytorch_examples_run(workspace: Path, code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102 - the README's own code


def test_the_lightning_example_runs(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [block for block in blocks("python") if "Trainer" in block and "MNIST" in block]
    assert code.count("max_epochs=1,") == code.count('base_checkpoint="logs/pretrain"') == 1
    short = code.replace("max_epochs=1,", "fast_dev_run=True, accelerator='cpu',")
    short = short.replace(', base_checkpoint="logs/pretrain"', "").replace("focus=[9]", "focus=[9], source='sample'")
    exec(compile(short, "README.md", "exec"), {})  # noqa: S102 - the README's own code


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")  # there is nothing to validate on
def test_the_example_with_pictures_runs(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    (code,) = [block for block in blocks("python") if "ImageFolderDataModule" in block]
    short = code.replace("Trainer(", "Trainer(accelerator='cpu', log_every_n_steps=1, ")
    with caplog.at_level("INFO"):
        exec(compile(short, "README.md", "exec"), {})  # noqa: S102 - the README's own code
    assert "Frozen prefix: the output of 'layer4.0'" in caplog.text


def test_every_file_and_config_it_names_exists() -> None:
    for path in re.findall(r"\]\(([\w./]+)\)", README) + re.findall(r"`(configs/\w+\.yaml)`", README):
        assert (ROOT / path).exists(), path
    for name in ("pretrain", "digit9", "digit7"):
        assert yaml.safe_load((ROOT / "configs" / "notebook" / f"{name}.yaml").read_text())


def test_every_public_name_is_exported() -> None:
    for name in lora_lightning.__all__:
        assert hasattr(lora_lightning, name)
    for name in re.findall(r"from lora_lightning import (.*)", README):
        for exported in name.split(","):
            assert exported.strip() in lora_lightning.__all__


def test_lora_imports_no_other_room() -> None:
    for path in (ROOT / "lora_lightning" / "lora").glob("*.py"):
        imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE)
        assert not [name for name in imported if name.startswith("lightning")]
        assert all(name.startswith("lora_lightning.lora") for name in imported if name.startswith("lora_lightning"))
