"""The files of a run and its page: one file with the story, the matrices, the samples, the layers and the curves."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_lightning.evaluation import Confusion, Report
from lora_lightning.evaluation.changes import ChangedSample, Pairs, small_image
from lora_lightning.lora import LoRAConfig, adapted_weights, attach
from lora_lightning.report import write_page
from lora_lightning.report.files import write_report
from lora_lightning.report.history import History, curves_figure
from lora_lightning.report.layers import layer_changes
from tests.helpers import stir

NAMES = ("cat", "<b>dog</b>", "$x_{")
BEFORE = torch.tensor([[8, 2, 0], [4, 6, 0], [0, 1, 9]])
AFTER = torch.tensor([[9, 1, 0], [1, 9, 0], [1, 0, 9]])
SAMPLES = [
    ChangedSample(1, 0, 1, 0.6, 0.9, image=small_image(torch.rand(1, 28, 28))),
    ChangedSample(2, 2, 0, 0.7, 0.5, text="a text with <script>alert(1)</script> and $y_{ in it"),
]
FACTS = {
    "command": "lora-lightning test",
    "seed": "7",
    "versions": {"torch": "2.15"},
    "device": "CPU",
    "devices": 1,
    "trained": 10,
    "total": 1010,
    "layers": [{"name": "fc", "rank": 2, "parameters": 10, "norm": 0.5, "base_norm": None, "effective_rank": 1.5}],
    "checkpoint": None,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "version_0"
    report = Report("test", Confusion(AFTER, NAMES), Confusion(BEFORE, NAMES), pairs=Pairs(6, 2, SAMPLES))
    write_report(report, folder)
    (folder / "run.json").write_text(json.dumps(FACTS))
    (folder / "config.yaml").write_text("seed_everything: 7 # <i>\n")
    History({1: {"train/loss": 2.0}, 2: {"train/loss": 1.0, "val/loss": 1.5}}).write(folder / "metrics.csv")
    return folder


class Page(HTMLParser):
    """Collects tags that are not closed as they were opened, addresses, and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.addresses += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.smoke
def test_the_page_tells_the_story_in_one_small_file_without_anything_from_outside(run: Path) -> None:
    write_page([run], run / "report.html")
    page = Page(run / "report.html")
    assert page.open == []
    assert all(each.startswith(("data:", "#")) for each in page.addresses)
    assert "http" not in (run / "report.html").read_text()
    assert (run / "report.html").stat().st_size < 3_000_000
    text = re.sub(r"\s+", " ", page.text)
    assert "Of 30 samples, the base gets 7 wrong and the adapted model 3: accuracy 76.67% → 90.00%." in text
    assert "The largest change is in '<b>dog</b>': 4 errors before, 1 after." in text
    assert (
        "Samples that were fixed: 6; that became wrong: 2 (McNemar's exact test of base against adapted: p = 0.29)."
        in text
    )
    assert "10 of 1,010 parameters trained, 1.00% of the base" in text
    assert "seed_everything: 7 # <i>" in text
    assert "effective rank" in text
    assert "a text with <script>alert(1)</script>" in text  # as text, not as a tag
    assert page.addresses.count(SAMPLES[0].image) == 1


def test_a_page_of_a_run_without_base_samples_or_curves(tmp_path: Path) -> None:
    write_report(Report("val", Confusion(AFTER, NAMES)), tmp_path)
    write_page([tmp_path], tmp_path / "report.html")
    text = Page(tmp_path / "report.html").text
    assert "The model makes 3 errors on 30 samples" in text
    assert "Samples that changed" not in text


def test_runs_are_compared_in_one_page(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "version_1"
    write_report(Report("test", Confusion(BEFORE, NAMES)), other)
    write_page([run, other], tmp_path / "both.html")
    page = Page(tmp_path / "both.html")
    assert page.addresses.count("#run-1") == page.addresses.count("#run-2") == 1
    assert "90.00 %" in page.text
    assert "76.67 %" in page.text


def test_a_thousand_classes_make_a_page_of_the_worst(tmp_path: Path) -> None:
    matrix = 10 * torch.eye(1000, dtype=torch.int64)
    matrix[7, 8] = 5
    names = tuple(f"class {index}" for index in range(1000))
    pairs = Pairs(1, 0, [ChangedSample(900, 3, 900, 0.5, 0.6)])
    write_report(Report("test", Confusion(matrix, names), Confusion(matrix, names), pairs=pairs), tmp_path)
    write_page([tmp_path], tmp_path / "report.html")
    text = Page(tmp_path / "report.html").text
    assert "Of 1,000 classes, the 20 with the lowest recall are shown" in text
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


def test_the_folder_gets_images_and_samples(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names >= {"confusion.png", "confusion_normalized.png", "difference.png", "mistakes.png", "samples.json"}
    content = json.loads((run / "confusion.json").read_text())
    assert content["changed"] == {"fixed": 6, "broke": 2, "mcnemar_p": pytest.approx(0.2890625)}


def test_metrics_are_written_and_drawn_by_what_they_measure(run: Path) -> None:
    with (run / "metrics.csv").open() as file:
        assert list(csv.DictReader(file)) == [
            {"step": "1", "train/loss": "2.0", "val/loss": ""},
            {"step": "2", "train/loss": "1.0", "val/loss": "1.5"},
        ]
    history = History.read(run / "metrics.csv")
    history.record(3, {"val/loss": 1.25, "val/recall/9": 0.5, "lr": float("nan")})
    assert history.curves() == {
        "loss": {"train/loss": [(1, 2.0), (2, 1.0)], "val/loss": [(2, 1.5), (3, 1.25)]},
    }
    figure = curves_figure(history)
    assert figure is not None
    assert [axis.get_title() for axis in figure.axes] == ["loss"]
    assert curves_figure(History({1: {"loss": 1.0}})) is None


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["0", "2"]},
        {"target_modules": ["0"], "init": "pissa"},
        {"target_modules": ["0"], "use_rslora": True},
    ],
)
def test_layers_are_measured_as_their_dense_change(config: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 5))
    attach(net, LoRAConfig(rank=3, alpha=5, **config))
    assert all(each["effective_rank"] == each["norm"] == 0 for each in layer_changes(net))
    stir(net)
    for each, found in zip(adapted_weights(net), layer_changes(net), strict=True):
        change = each.adapter.delta_weight(each.weight)
        values = torch.linalg.svdvals(change.detach().flatten(1).double())
        shares = values / values.sum()
        shares = shares[shares > 1e-9]
        assert found["norm"] == pytest.approx(float(change.detach().norm()), rel=1e-5)
        assert found["base_norm"] == pytest.approx(float(each.weight.detach().norm()), rel=1e-5)
        assert found["effective_rank"] == pytest.approx(float((-shares * shares.log()).sum().exp()), rel=1e-4)
        assert found["rank"] == 3
