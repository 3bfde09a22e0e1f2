"""What a test says below its table: the verdict of the page, and where the page is."""

from __future__ import annotations

import html
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rich
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import Classifier, ComparisonReport, ConfusionReport, LoRAFinetuning, MNISTDataModule, RichBoyNet
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


@pytest.fixture
def terminal() -> Iterator[io.StringIO]:
    """What a terminal of 80 columns gets: Rich's bar and, as for stderr, what Lightning logs."""
    written = io.StringIO()
    # Of the root, since tests of `pytorch_lightning` may have run in this process, which then logs in its name.
    logger, handler = logging.getLogger(), logging.StreamHandler(written)
    logger.addHandler(handler)
    yield written
    logger.removeHandler(handler)
    rich.reconfigure()


def bar(terminal: io.StringIO) -> RichProgressBar:
    return RichProgressBar(console_kwargs={"file": terminal, "force_terminal": True, "width": 80})


def test_the_adapter_folder_stays_on_the_terminal_after_a_fit(make_trainer: MakeTrainer, terminal: io.StringIO) -> None:
    callback = LoRAFinetuning(rank=2)
    trainer = make_trainer(callback, bar(terminal), enable_progress_bar=True, max_epochs=1)
    trainer.fit(Classifier(RichBoyNet(16, 8)), datamodule=MNISTDataModule(source="sample"))
    before, found, after = terminal.getvalue().partition(f"Adapters written: {callback.adapter_folder}")
    assert "Epoch 0/0" in before
    assert found
    assert "\x1b[1A" not in after, "the bar goes up again and erases lines"


def test_the_path_of_the_page_stays_on_the_terminal_after_a_test(
    make_trainer: MakeTrainer, terminal: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    digits_tested(make_trainer(ConfusionReport(), bar(terminal), enable_progress_bar=True))
    before, _, after = terminal.getvalue().partition("Report: ")
    assert "Testing" in before
    assert Path(after.split()[0]) == Path("logs/test/version_0/report.html")
    assert Path(after.split()[0]).is_file()
    assert "\x1b[1A" not in after, "the bar goes up again and erases lines"


@pytest.mark.parametrize("focus", [[4], [4, 9], None])
def test_a_page_begins_with_the_class_that_the_data_have_in_focus(
    make_trainer: MakeTrainer, tmp_path: Path, focus: list[int] | None
) -> None:
    digits_tested(make_trainer(ConfusionReport()), MNISTDataModule(source="sample", focus=focus))
    (page,) = tmp_path.rglob("report.html")
    first = Run(page.parent).views[0].cards[0]
    if focus is None:
        assert "the class that changed most" in first.note
    else:
        assert first.title == "Errors on " + " and ".join(f"digit {each}" for each in focus)
        assert "in focus" in first.note
        assert first.title in html.unescape(page.read_text()).replace("\u00a0", " ")
