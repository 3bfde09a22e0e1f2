"""`lora-lightning report`, and the page that every run leaves."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str]]
SMALL = ("--data.source", "sample", "--trainer.max_steps", "20", "--trainer.max_epochs", "1")


@pytest.fixture
def tested(run: Run, a_base_with_adapters: Path) -> Run:
    """A base and adapters, trained for a few steps and tested."""
    code, text = run("test", "--config", "configs/adapt.yaml", *SMALL[:2], "--ckpt_path", "logs/adapt")
    assert code == 0, text
    assert "report     logs/adapt/version_1/report.html" in text
    return run


def test_every_run_leaves_its_files_and_a_page_of_them(tested: Run) -> None:
    trained, evaluated = Path("logs/adapt/version_0"), Path("logs/adapt/version_1")
    assert {path.name for path in trained.iterdir()} >= {"report.html", "metrics.csv", "curves.png", "run.json"}
    names = ["report", "confusion", "difference", "mistakes"]
    assert {path.stem for path in evaluated.iterdir()} >= {*names, "samples", "run"}
    with (trained / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows][:3] == [2, 4, 6]
    assert float(rows[0]["train/loss"]) > 0
    assert float(rows[0]["lr"]) > 0
    facts = json.loads((evaluated / "run.json").read_text())
    assert [layer["name"] for layer in facts["layers"]] == [f"backbone.linear{number}" for number in (1, 2, 3)]
    assert all(layer["norm"] > 0 for layer in facts["layers"])
    assert facts["seed"] == "0"
    page = (evaluated / "report.html").read_text()
    assert "McNemar" in page
    assert re.search(r"adapter/adapter_model.safetensors 0\.\d\d MB, checkpoints/epoch=", page)
    assert "Curves of the training" in page  # those of the training whose checkpoint was tested
    assert page.count("data:image/png;base64") == len(json.loads((evaluated / "samples.json").read_text()))
    assert "parameters were trained" in (trained / "report.html").read_text()
    content = json.loads((evaluated / "confusion.json").read_text())
    fixed_less_broken = content["changed"]["fixed"] - content["changed"]["broke"]
    assert fixed_less_broken == content["base"]["errors"] - content["model"]["errors"]


def test_a_page_is_made_again_and_of_several_runs_and_overwrites_nothing(tested: Run) -> None:
    before = Path("logs/adapt/version_1/report.html").read_text()
    code, text = tested("report", "logs/adapt")
    assert code == 0, text
    assert "logs/adapt/version_1/report.html" in text
    assert Path("logs/adapt/version_1/report.html").read_text() == before
    Path("logs/adapt/version_1/report.html").write_text("a page of my own")
    code, text = tested("report", "logs/adapt")
    assert code == 0, text
    assert Path("logs/adapt/version_1/report.html").read_text() == "a page of my own"
    assert Path("logs/adapt/version_1/report-v1.html").read_text() == before
    code, text = tested("report", "logs/adapt", "logs/pretrain")
    assert code == 0, text
    assert "logs/adapt/version_1/compare.html" in text
    assert "3 layers, rank 1" in Path("logs/adapt/version_1/compare.html").read_text()
    assert Path("logs/adapt/version_1/report-v1.html").read_text() == before
    code, text = tested("report", "logs/adapt", "logs/pretrain", "--output", "compare.html")
    assert code == 0, text
    assert "2 runs" in Path("compare.html").read_text()
    code, text = tested("report", "logs/adapt", "--output", "compare.html")
    assert code == 1
    assert "compare.html exists" in text


@pytest.mark.parametrize(
    ("folder", "message"), [("nowhere", "nowhere does not exist"), ("empty", "empty contains no run")]
)
def test_a_folder_without_a_run_is_named(run: Run, folder: str, message: str) -> None:
    Path("empty").mkdir()
    code, text = run("report", folder)
    assert code == 1
    assert message in text


def test_a_page_that_can_not_be_made_costs_no_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folders: list[Path], path: Path) -> None:
        raise RuntimeError("no page today")

    monkeypatch.setattr("lora_lightning.callbacks.run_files.write_page", broken)
    with pytest.warns(UserWarning, match=r"report.html could not be written .*RuntimeError: no page today"):
        code, text = run("fit", "--config", "configs/pretrain.yaml", *SMALL)
    assert code == 0, text
