"""`ConfusionReport` in real passes over data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import Classifier, ConfusionReport, LoRAFinetuning, MNISTDataModule, RichBoyNet

MakeTrainer = Callable[..., Trainer]


def sample(**arguments: object) -> MNISTDataModule:
    return MNISTDataModule(**({"source": "sample", "batch_size": 100, "eval_batch_size": 300} | arguments))


def count(model: nn.Module) -> list[list[int]]:
    """The confusion matrix of the sample's test digits, the slow way."""
    data = sample()
    data.setup("test")
    matrix = torch.zeros(10, 10, dtype=torch.int64)
    for batch in data.test_dataloader():
        images, digits = data.on_after_batch_transfer(batch, 0)
        for digit, predicted in zip(digits, model(images).argmax(1), strict=True):
            matrix[digit, predicted] += 1
    return matrix.tolist()


def test_a_plain_model_is_counted_exactly(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    model, report = Classifier(RichBoyNet(16, 8)), ConfusionReport()
    make_trainer(report).test(model, datamodule=sample(), verbose=False)
    assert report.report.model.matrix.tolist() == count(model)
    assert report.report.base is None
    (path,) = tmp_path.rglob("confusion.json")
    content = json.loads(path.read_text())
    assert content["samples"] == 1000
    assert content["base"] is None
    assert path.with_suffix(".csv").exists()


def test_one_test_pass_gives_base_and_adapted_side_by_side(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Classifier(RichBoyNet(16, 8), optimizer=lambda p: torch.optim.Adam(p, lr=0.1))
    expected_base = count(model)
    report = ConfusionReport()
    trainer = make_trainer(LoRAFinetuning(rank=2), report, max_epochs=1)
    trainer.fit(model, datamodule=sample(digits=[9]))
    (logged,) = trainer.test(model, datamodule=sample(), verbose=False)
    assert report.report.base.matrix.tolist() == expected_base
    assert report.report.model.matrix.tolist() == count(model)
    assert report.report.model.matrix.tolist() != expected_base
    assert logged["test/accuracy"] == pytest.approx(report.report.model.accuracy)
    printed = capsys.readouterr().out
    assert "before" in printed
    assert "1,000" in printed


def test_tensorboard_gets_figures_and_per_class_scalars(make_trainer: MakeTrainer) -> None:
    model, report = Classifier(RichBoyNet(16, 8)), ConfusionReport(verbose=False)
    trainer = make_trainer(LoRAFinetuning(rank=1), report, max_epochs=1, limit_train_batches=2)
    trainer.fit(model, datamodule=sample())
    trainer.test(model, datamodule=sample(), verbose=False)
    trainer.logger.experiment.flush()
    events = EventAccumulator(trainer.log_dir).Reload()
    tags = events.Tags()
    assert set(tags["images"]) == {f"test/confusion/{name}" for name in ("base", "adapted", "difference")}
    assert {f"test/recall/{digit}" for digit in range(10)} <= set(tags["scalars"])
    assert {f"test/base_recall/{digit}" for digit in range(10)} <= set(tags["scalars"])
    assert {f"val/recall/{digit}" for digit in range(10)} <= set(tags["scalars"])
    (scalar,) = events.Scalars("test/recall/3")
    assert scalar.value == pytest.approx(report.report.model.recall[3])


def test_validate_reports_too(make_trainer: MakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = ConfusionReport()
    make_trainer(report).validate(Classifier(RichBoyNet(16, 8)), datamodule=sample(), verbose=False)
    assert report.report.stage == "val"
    assert report.report.model.total == 400
    assert "digit" in capsys.readouterr().out
    assert list(tmp_path.rglob("confusion_val.json"))


def test_fit_prints_and_writes_nothing(
    make_trainer: MakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = ConfusionReport()
    trainer = make_trainer(report, max_epochs=2, limit_train_batches=1)
    trainer.fit(Classifier(RichBoyNet(16, 8)), datamodule=sample())
    assert report.report is None
    assert "digit" not in capsys.readouterr().out
    assert not list(tmp_path.rglob("confusion*"))


class Own(pl.LightningModule):
    """Three classes of a user's own, and what its test step returns."""

    def __init__(self, outputs: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.outputs = outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        return self.outputs(self(batch[0]), batch[1])

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(7, 4), torch.arange(7) % 3), batch_size=2)


def own(outputs: Any = lambda logits, targets: {"logits": logits, "targets": targets}) -> Own:
    return Own(outputs)


def test_any_number_of_classes_by_name(make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    report = ConfusionReport(class_names=["cat", "dog", "eel"])
    make_trainer(report).test(own())
    assert report.report.model.support == [3, 2, 2]
    assert "eel" in capsys.readouterr().out


def test_of_many_classes_the_worst_are_logged_and_in_fit_their_mean(make_trainer: MakeTrainer) -> None:
    model = Classifier(nn.Linear(4, 30), num_classes=30)
    samples = TensorDataset(torch.randn(90, 4), torch.arange(90) % 30)
    trainer = make_trainer(report := ConfusionReport(verbose=False), max_epochs=1)
    trainer.fit(model, DataLoader(samples, batch_size=45), DataLoader(samples, batch_size=45))
    trainer.test(model, DataLoader(samples, batch_size=45), verbose=False)
    trainer.logger.experiment.flush()
    tags = EventAccumulator(trainer.log_dir).Reload().Tags()["scalars"]
    assert [tag for tag in tags if tag.startswith("val/") and "recall" in tag] == ["val/mean_recall"]
    recall = report.report.model.recall
    shown = {int(tag.rpartition("/")[2]) for tag in tags if tag.startswith("test/recall/")}
    assert len(shown) == 20
    assert max(recall[index] for index in shown) <= min(recall[index] for index in set(range(30)) - shown)
    assert trainer.callback_metrics["test/accuracy"] == pytest.approx(sum(recall) / 30)


def test_classes_without_names_are_numbered(make_trainer: MakeTrainer) -> None:
    report = ConfusionReport()
    make_trainer(report).test(own())
    assert report.report.model.class_names == ("0", "1", "2")


def test_names_that_do_not_fit_are_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match=r"2 class names \(cat, dog, ...\) for a model of 3 classes"):
        make_trainer(ConfusionReport(class_names=["cat", "dog"])).test(own())


@pytest.mark.parametrize(
    ("outputs", "found"),
    [
        (lambda logits, targets: None, "NoneType"),
        (lambda logits, targets: logits, "Tensor"),
        (lambda logits, targets: {"logits": logits}, r"\['logits'\]"),
    ],
)
def test_a_step_that_returns_something_else_is_told_what_to_return(
    make_trainer: MakeTrainer, outputs: Any, found: str
) -> None:
    with pytest.raises(ValueError, match=rf"got {found} from Own's step; expected a dictionary with 'logits' of shape"):
        make_trainer(ConfusionReport()).test(own(outputs))
