"""What README and docs say is so."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

import lora_lightning
from lora_lightning.cli.lightning_cli import FUNCTIONS, LoRALightningCLI
from lora_lightning.cli.repair import divide, repair_parser
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGE = ROOT / "lora_lightning"
ORDER = (
    "wording",
    "lora",
    "lightning_packages",
    "backbone_facts",
    "checkpoints",
    "peft_format",
    "evaluation",
    "report",
    "data",
    "models",
    "callbacks",
    "find_lr",
    "repair",
    "cli",
)
"""A package imports itself and those to the left of it."""


def blocks(language: str) -> list[Any]:
    return [
        pytest.param(code, id=f"{page.stem}-{index}")
        for page in PAGES
        for index, code in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL))
    ]


def commands() -> list[Any]:
    return [
        pytest.param(line, id=line)
        for block in blocks("bash")
        for line in block.values[0].replace("\\\n", "").splitlines()
        if line.startswith("lora-lightning ")
    ]


def test_the_two_commands_are_there() -> None:
    lines = [line for block in blocks("bash") for line in block.values[0].splitlines()]
    assert "python -m venv .venv && .venv/bin/pip install -e . && .venv/bin/lora-lightning repair" in lines
    assert 'python -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/pytest' in lines


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")  # there is nothing to validate on
@pytest.mark.parametrize("code", blocks("python"))
def test_every_snippet_runs(workspace: Path, code: str) -> None:
    if "Trainer" in code:
        # Run one batch, and a pretrained base is not here.
        code = code.replace('base_checkpoint="logs/pretrain"', "")
        code = code.replace("Trainer(", "Trainer(accelerator='cpu', log_every_n_steps=1, ")
        code = code.replace("max_epochs=1,", "fast_dev_run=True,")
    exec(compile(code, "docs", "exec"), {"__name__": "docs"})  # noqa: S102 - the project's own code


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize("line", commands())
def test_every_command_is_understood(
    workspace: Path, line: str, monkeypatch: pytest.MonkeyPatch, tiny_bert: str, small_efficientnet: None
) -> None:
    words = [word.strip('"') for word in line.split()[1:]]
    if words[0] == "repair":
        of_config, own = divide(words[1:])
        repair_parser().parse_args(own)
        if not of_config:
            return
        words = ["merge", *of_config]  # which takes a configuration without a command, too
    monkeypatch.setattr(LoRALightningCLI, "_run_subcommand", lambda self, subcommand: None)
    for folder in ("logs/pretrain", "logs/adapt"):  # a log folder stands for the checkpoint in it
        (workspace / folder).mkdir(parents=True)
        (workspace / folder / "any.ckpt").touch()
    if words[0] == "report":
        return  # tests/cli/test_report.py runs it
    for name in ("data/banking77/train.csv", "train.jsonl", "mine.csv"):
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / name).write_text('{"text": "a", "topic": "b"}\n{"text": "c", "topic": "d"}\n')
    (workspace / "data/banking77/train.csv").write_text("text,category\na,b\nc,d\n")
    for name in ("photos/a", "photos/b"):
        (workspace / name).mkdir(parents=True)
    words = words[: words.index("--ckpt_path")] if "--ckpt_path" in words and "last" not in words else words
    if "configs/images.yaml" in words:  # which downloads weights
        words += ["--model.backbone.weights", "null"]
    if "configs/text.yaml" in words:  # which names a model of the hub
        words += ["--model.backbone.name", tiny_bert]
    if words[0] in FUNCTIONS:
        cli = LoRALightningCLI(words[1:], run=False, command=words[0])
    else:
        cli = LoRALightningCLI(words)
        assert cli.subcommand == words[0]
    assert cli.model is not None


def test_every_file_that_pages_name_exists() -> None:
    for page in PAGES:
        text = page.read_text()
        for path in re.findall(r"\]\(([\w./]+)(?:#[\w-]+)?\)", text):
            assert (page.parent / path).exists(), (page.name, path)
        for path in re.findall(r"`((?:configs|lora_lightning|tests|docs)/[\w/]+\.\w+)`", text):
            assert (ROOT / path).exists(), (page.name, path)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_public_name_is_exported_and_documented() -> None:
    pages = "".join(page.read_text() for page in PAGES)
    for name in lora_lightning.__all__:
        assert hasattr(lora_lightning, name)
        assert name in pages
    for name in re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE):
        found: Any = lora_lightning
        for part in name.split(".")[1:]:
            found = getattr(found, part)


def test_imports_point_one_way() -> None:
    for index, package in enumerate(ORDER):
        allowed = {f"lora_lightning.{name}" for name in ORDER[: index + 1]}
        files = list((PACKAGE / package).rglob("*.py")) or [PACKAGE / f"{package}.py"]
        for path in files:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_lightning."):
                    target = ".".join(str(node.module).split(".")[:2])
                    assert target in allowed, (path, node.module)
                if isinstance(node, ast.ImportFrom | ast.Import) and package == "lora":
                    names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                    assert not [name for name in names if str(name).startswith("lightning")], path


def test_no_module_of_repair_or_the_command_line_imports_itself_through_others() -> None:
    """Imports inside functions count, too."""
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name.startswith(("lora_lightning.repair", "lora_lightning.cli")):
            nodes = ast.walk(ast.parse(path.read_text()))
            graph[name] = {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)  # which raises CycleError
