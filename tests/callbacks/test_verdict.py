"""What a test says below its table: the verdict of the page, and where the page is."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import Classifier, ComparisonReport, ConfusionReport, MNISTDataModule, RichBoyNet
from lora_lightning.lora import LoRAConfig, attach
from lora_lightning.report.page import Run
from tests.callbacks.test_comparison import Task
from tests.helpers import stir

MakeTrainer = Callable[..., Trainer]


def digits_tested(trainer: Trainer, data: LightningDataModule | None = None) -> None:
    """Test adapters that change some answers."""
    model = Classifier(RichBoyNet(16, 8))
    attach(model.backbone, LoRAConfig(rank=2))
    stir(model)
    trainer.test(model, datamodule=data or MNISTDataModule(source="sample"), verbose=False)


def below_the_table(printed: str) -> str:
    """What was printed after the last line of the table."""
    return printed.rpartition("┘")[2]


@pytest.mark.parametrize("kind", ["classes", "multilabel", "regression"])
def test_a_test_ends_with_the_sentence_of_its_page(
    make_trainer: MakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    if kind == "classes":
        digits_tested(make_trainer(ConfusionReport()))
    else:
        net = nn.Linear(6, 3)
        attach(net, LoRAConfig(rank=2))
        stir(net)
        targets = torch.randn(64, 3) if kind == "regression" else torch.randint(2, (64, 3))
        loader = DataLoader(TensorDataset(torch.randn(64, 6), targets), batch_size=7)
        make_trainer(ComparisonReport()).test(Task(net), loader, verbose=False)
    (page,) = tmp_path.rglob("report.html")
    verdict = Run(page.parent).views[0].verdict
    assert verdict.sentence in html.unescape(page.read_text()).replace("\u00a0", " ")
    (said,) = [
        line
        for line in below_the_table(capsys.readouterr().out).splitlines()
        if line.startswith(verdict.sentence.removesuffix("."))
    ]
    assert said.endswith(("p < 0.001).", f"(p = {verdict.p:.2g})."))


def test_a_test_without_a_log_folder_has_the_sentence_too(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    digits_tested(make_trainer(ConfusionReport(), logger=False))
    assert "errors" in below_the_table(capsys.readouterr().out)
