"""`ConfusionReport` in real passes over data."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import Classifier, ConfusionReport, LoRAFinetuning, MNISTDataModule, RichBoyNet
from tests.helpers import stir

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
    assert report.report.adapted.matrix.tolist() == count(model)
    assert report.report.base is None
    (path,) = tmp_path.rglob("confusion.json")
    content = json.loads(path.read_text())
    assert content["samples"] == 2000
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
    assert report.report.adapted.matrix.tolist() == count(model)
    assert report.report.adapted.matrix.tolist() != expected_base
    assert logged["test/accuracy"] == pytest.approx(report.report.adapted.accuracy)
    printed = capsys.readouterr().out
    assert "before" in printed
    assert "2,000" in printed


def test_tensorboard_gets_figures_curves_and_settings_and_no_card_for_each_class(make_trainer: MakeTrainer) -> None:
    torch.manual_seed(0)
    # A high rate, so that the adapters change the prediction of some samples.
    model = Classifier(RichBoyNet(16, 8), optimizer=lambda p: torch.optim.Adam(p, lr=0.1))
    report = ConfusionReport(verbose=False)
    trainer = make_trainer(LoRAFinetuning(rank=1), report, max_epochs=1, limit_train_batches=2)
    trainer.fit(model, datamodule=sample())
    trainer.test(model, datamodule=sample(), verbose=False)
    trainer.logger.experiment.flush()
    events = EventAccumulator(trainer.log_dir).Reload()
    tags = events.Tags()
    figures = ("base", "adapted", "difference", "classes", "changed_samples")
    assert set(tags["images"]) == {f"test/confusion/{name}" for name in figures}
    assert {f"val/recall/{digit}" for digit in range(10)} <= set(tags["scalars"])
    assert not [tag for tag in tags["scalars"] if tag.startswith("test/") and tag.count("/") > 1]
    expected = {"updates/lr", "updates/delta_norm", "train/loss", "verdict/errors", "verdict/base_errors"}
    assert expected <= set(tags["scalars"])
    assert [event.value for event in events.Scalars("updates/lr")] == pytest.approx([0.1] * 2)
    assert events.Scalars("verdict/errors")[0].value == sum(report.report.adapted.errors)
    hparams = yaml.safe_load((Path(trainer.log_dir) / "hparams.yaml").read_text())
    assert (hparams["rank"], hparams["alpha"], hparams["target_modules"]) == (1, 1, "all")


def charts(events: EventAccumulator) -> dict[str, list[str]]:
    """The charts under custom scalars, each with the tags that it draws."""
    (config,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(config.tensor_proto.string_val[0])
    tags = events.Tags()["scalars"]
    return {
        chart.title: [tag for tag in tags if any(re.match(pattern, tag) for pattern in chart.multiline.tag)]
        for category in layout.category
        for chart in category.chart
    }


def test_tensorboard_draws_loss_and_recall_first_of_training_and_validation_together(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(LoRAFinetuning(rank=1), ConfusionReport(verbose=False), max_epochs=2, limit_train_batches=2)
    trainer.fit(Classifier(RichBoyNet(16, 8)), datamodule=sample())
    trainer.logger.experiment.flush()
    events = EventAccumulator(trainer.log_dir).Reload()
    drawn = charts(events)
    assert list(drawn) == ["loss", "recall by class", "accuracy"]
    assert sorted(drawn["loss"]) == ["train/loss", "val/loss"]
    assert sorted(drawn["recall by class"]) == [f"val/recall/{digit}" for digit in range(10)]
    tags = events.Tags()["scalars"]
    groups = sorted({tag.partition("/")[0] for tag in tags})  # the first two are open
    assert groups[:2] == ["epoch", "train"]  # of which Lightning adds the first
    for tag in tags:
        steps = [event.step for event in events.Scalars(tag)]
        assert len(steps) == len(set(steps)) or tag == "epoch", f"{tag} is logged twice for a step"
    assert "updates/lr" in tags


def test_a_rate_that_lightning_logs_is_not_logged_twice(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(LearningRateMonitor(), ConfusionReport(verbose=False), max_epochs=1, limit_train_batches=2)
    trainer.fit(Classifier(RichBoyNet(16, 8)), datamodule=sample())
    trainer.logger.experiment.flush()
    tags = EventAccumulator(trainer.log_dir).Reload().Tags()["scalars"]
    assert [tag for tag in tags if "lr" in tag] == ["lr-Adam"]


def test_every_run_is_in_tensorboards_table_with_its_settings_and_final_errors(make_trainer: MakeTrainer) -> None:
    model, report = Classifier(RichBoyNet(16, 8)), ConfusionReport(verbose=False)
    trainer = make_trainer(LoRAFinetuning(rank=2, alpha=4), report, max_epochs=1, limit_train_batches=2)
    trainer.fit(model, datamodule=sample(focus=[9]))
    trainer.logger.experiment.flush()
    events = EventAccumulator(trainer.log_dir).Reload()
    metadata = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(metadata).session_start_info.hparams
    assert (settings["rank"].number_value, settings["alpha"].number_value) == (2, 4)
    assert (settings["target_modules"].string_value, settings["focus"].string_value) == ("all", "[9]")
    assert "seed" in settings
    (errors,) = events.Scalars("verdict/val_errors")
    assert 0 < errors.value <= 300


def test_other_loggers_get_numbers_by_class_whatever_the_names(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    report = ConfusionReport(["<b>$x_{</b>", "a/b", *map(str, range(8))], verbose=False)
    trainer = make_trainer(report, logger=CSVLogger(tmp_path))
    trainer.test(Classifier(RichBoyNet(16, 8)), datamodule=sample(), verbose=False)
    trainer.logger.save()
    with (Path(trainer.log_dir) / "metrics.csv").open() as file:
        logged = {name: value for row in csv.DictReader(file) for name, value in row.items() if value}
    assert float(logged["test/recall/a_b"]) == pytest.approx(report.report.adapted.recall[1])
    assert "test/recall/_b__x___/b_".replace("/b_", "_b_") in logged


def test_validate_reports_too(make_trainer: MakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = ConfusionReport()
    make_trainer(report).validate(Classifier(RichBoyNet(16, 8)), datamodule=sample(), verbose=False)
    assert report.report.stage == "val"
    assert report.report.adapted.total == 300
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
    assert report.report.adapted.support == [3, 2, 2]
    assert "eel" in capsys.readouterr().out


def test_of_many_classes_the_worst_are_logged_and_in_fit_their_mean(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    model = Classifier(nn.Linear(4, 30), num_classes=30)
    samples = TensorDataset(torch.randn(90, 4), torch.arange(90) % 30)
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(report := ConfusionReport(verbose=False), max_epochs=1, logger=logger)
    trainer.fit(model, DataLoader(samples, batch_size=45), DataLoader(samples, batch_size=45))
    trainer.test(model, DataLoader(samples, batch_size=45), verbose=False)
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        tags = csv.DictReader(file).fieldnames
    assert (Path(logger.log_dir) / "curves.png").is_file()
    assert [tag for tag in tags if tag.startswith("val/") and "recall" in tag] == ["val/mean_recall"]
    recall = report.report.adapted.recall
    shown = {int(tag.rpartition("/")[2]) for tag in tags if tag.startswith("test/recall/")}
    assert len(shown) == 20
    assert max(recall[index] for index in shown) <= min(recall[index] for index in set(range(30)) - shown)
    assert trainer.callback_metrics["test/accuracy"] == pytest.approx(sum(recall) / 30)


def test_classes_without_names_are_numbered(make_trainer: MakeTrainer) -> None:
    report = ConfusionReport()
    make_trainer(report).test(own())
    assert report.report.adapted.class_names == ("0", "1", "2")


def test_names_that_do_not_fit_do_not_end_the_run_and_the_classes_are_numbered(make_trainer: MakeTrainer) -> None:
    report = ConfusionReport(class_names=["cat", "dog"])
    with pytest.warns(UserWarning, match=r"2 class names \(cat, dog\) do not fit a model of 3 classes"):
        make_trainer(report).test(own())
    assert report.report.adapted.class_names == ("0", "1", "2")


def test_names_may_be_an_array(make_trainer: MakeTrainer) -> None:
    class Named(pl.LightningDataModule):
        class_names = np.array(["cat", "dog", "eel"])

        def test_dataloader(self) -> Any:
            return DataLoader(TensorDataset(torch.randn(9, 4), torch.arange(9) % 3), batch_size=9)

    report = ConfusionReport()
    make_trainer(report).test(Classifier(nn.Linear(4, 3)), datamodule=Named())
    assert report.report.adapted.class_names == ("cat", "dog", "eel")


class Task(pl.LightningModule):
    """A user's module whose steps return nothing, on whatever batches."""

    def __init__(self, net: nn.Module, batches: list[Any], step: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.net = net
        self.batches = batches
        self.steps = 0
        self.step = step or (lambda task, batch: task(batch["image"]))

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch["image"]).float().square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.step(self, batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.steps += 1
        self.log("test/steps", 1.0, batch_size=1)
        self.step(self, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def loader(self, batches: Any = None) -> DataLoader[Any]:
        return DataLoader(batches or self.batches, batch_size=None)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader()

    val_dataloader = test_dataloader = train_dataloader


def matrix(predicted: torch.Tensor, targets: torch.Tensor, classes: int) -> list[list[int]]:
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for row, column in zip(targets.flatten(), predicted.flatten(), strict=True):
        if 0 <= row < classes:
            counts[row, column] += 1
    return counts.tolist()


IMAGES = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
CLASSES = torch.arange(8) % 3


class Wrapped(nn.Module):
    """Returns its logits inside of something else."""

    def __init__(self, wrap: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.wrap = wrap

    def forward(self, x: torch.Tensor) -> Any:
        return self.wrap(self.layer(x))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: logits,
        lambda logits: SimpleNamespace(loss=torch.tensor(0.0), logits=logits),
        lambda logits: {"features": torch.zeros(8, 9, 9), "logits": logits},
        lambda logits: (torch.tensor(0.0), logits),
    ],
    ids=["tensor", "attribute", "dictionary", "tuple"],
)
@pytest.mark.parametrize("call", ["self", "forward", "child"])
def test_a_step_that_returns_nothing_is_counted_by_what_it_called(
    make_trainer: MakeTrainer, wrap: Any, call: str, tmp_path: Path
) -> None:
    calls = {
        "self": lambda task, x: task(x),
        "forward": lambda task, x: task.forward(x),
        "child": lambda t, x: t.net(x),
    }
    task = Task(Wrapped(wrap), [{"image": IMAGES, "label": CLASSES}], lambda t, batch: calls[call](t, batch["image"]))
    expected = matrix(task.net.layer(IMAGES).argmax(1), CLASSES, 3)
    report = ConfusionReport(verbose=False)
    trainer = make_trainer(LoRAFinetuning(rank=2), report, logger=CSVLogger(tmp_path))  # which draws no figures
    trainer.test(task, verbose=False)
    stir(task.net, 1.0)
    adapted = matrix(task.net.layer(IMAGES).argmax(1), CLASSES, 3)
    trainer.test(task, verbose=False)
    assert report.report.adapted.matrix.tolist() == adapted != expected
    assert report.report.base.matrix.tolist() == expected
    assert task.steps == 2
    assert "forward" not in vars(task)


@pytest.mark.parametrize(
    "batch",
    [
        *({"image": IMAGES, key: CLASSES} for key in ("labels", "label", "targets", "target", "y", "mask")),
        {"image": IMAGES, "label": CLASSES[:, None]},
        {"image": IMAGES, "label": nn.functional.one_hot(CLASSES).float()},
        SimpleNamespace(image=IMAGES, y=CLASSES),
        (IMAGES, CLASSES),
        [IMAGES, {"labels": CLASSES}],
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_targets_are_found_where_batches_have_them(make_trainer: MakeTrainer, batch: Any) -> None:
    task = Task(nn.Linear(6, 3), [batch], lambda task, batch: task(IMAGES))
    make_trainer(report := ConfusionReport(verbose=False)).test(task, verbose=False)
    assert report.report.adapted.matrix.tolist() == matrix(task.net(IMAGES).argmax(1), CLASSES, 3)


def test_targets_elsewhere_are_named(make_trainer: MakeTrainer) -> None:
    for batch, key in (({"image": IMAGES, "species": CLASSES}, "species"), ((CLASSES, IMAGES), 0)):
        task = Task(nn.Linear(6, 3), [batch], lambda task, batch: task(IMAGES))
        make_trainer(report := ConfusionReport(verbose=False, target_key=key)).test(task, verbose=False)
        assert report.report.adapted.total == 8


@pytest.mark.parametrize("outputs_are", ["logits", "probabilities"])
@pytest.mark.parametrize("shape", [(8, 1), (8,)], ids=str)
def test_one_output_a_sample_stands_for_two_classes(
    make_trainer: MakeTrainer, outputs_are: str, shape: tuple[int, ...]
) -> None:
    class Net(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = super().forward(x).view(shape)
            return logits.sigmoid() if outputs_are == "probabilities" else logits

    task = Task(Net(6, 1), [{"image": IMAGES, "label": CLASSES.clamp(max=1)}])
    make_trainer(report := ConfusionReport(verbose=False)).test(task, verbose=False)
    logits = nn.functional.linear(IMAGES, task.net.weight, task.net.bias)
    assert report.report.adapted.matrix.tolist() == matrix((logits > 0).long(), CLASSES.clamp(max=1), 2)


@pytest.mark.parametrize("classes", [1, 4])
def test_pixels_are_counted_without_those_to_ignore(make_trainer: MakeTrainer, classes: int) -> None:
    images = torch.randn(2, 3, 5, 6)
    masks = torch.randint(0, max(classes, 2), (2, 5, 6))
    masks[0, 0], masks[1, 1] = 255, -100
    task = Task(nn.Conv2d(3, classes, 1), [{"image": images, "mask": masks}])
    trainer = make_trainer(LoRAFinetuning(rank=1), report := ConfusionReport(verbose=False, ignore_index=255))
    trainer.test(task, verbose=False)
    logits = task.net(images)
    predicted = logits.argmax(1) if classes > 1 else (logits.squeeze(1) > 0).long()
    assert report.report.adapted.matrix.tolist() == matrix(predicted, masks, max(classes, 2))
    assert report.report.base.total == report.report.adapted.total == 2 * 5 * 6 - 12


def test_tokens_are_counted_with_the_class_last(make_trainer: MakeTrainer) -> None:
    labels = torch.tensor([[0, 1, -100], [2, -100, -100]])
    tokens = torch.randn(2, 3, 6)
    task = Task(nn.Linear(6, 4), [{"image": tokens, "labels": labels}])
    make_trainer(report := ConfusionReport(verbose=False)).test(task, verbose=False)
    assert report.report.adapted.matrix.tolist() == matrix(task.net(tokens).argmax(2), labels, 4)
    assert report.report.adapted.total == 3


def test_each_loader_has_a_report(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    task = Task(nn.Linear(6, 3), [])
    loaders = [task.loader([(IMAGES, CLASSES)]), task.loader([(IMAGES, CLASSES.flip(0)), (IMAGES, CLASSES)])]
    task.step = lambda task, batch: task(batch[0])
    trainer = make_trainer(report := ConfusionReport())
    trainer.test(task, loaders, verbose=False)
    assert [each.adapted.total for each in report.reports] == [8, 16]
    assert report.report is report.reports[0]
    names = {f"confusion_dataloader_idx_{i}.json" for i in (0, 1)}
    assert {path.name for path in tmp_path.rglob("*.json")} == {*names, "run.json"}


def test_a_fit_with_several_validation_loaders_logs_the_recall_of_each(make_trainer: MakeTrainer) -> None:
    class Two(Task):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val/seen", 1.0, batch_size=1)
            self(batch["image"])

    batch, other = {"image": IMAGES, "label": CLASSES}, {"image": IMAGES, "label": CLASSES.flip(0)}
    task = Two(nn.Linear(6, 3), [batch])
    trainer = make_trainer(LoRAFinetuning(rank=1), ConfusionReport(verbose=False), max_epochs=2)
    trainer.fit(task, task.loader(), [task.loader(), task.loader([other, batch])])
    predicted = task.net(IMAGES).argmax(1)
    for loader, targets in enumerate((CLASSES, torch.cat((CLASSES.flip(0), CLASSES)))):
        right = predicted.repeat(loader + 1) == targets
        for label in range(3):
            recall = trainer.callback_metrics[f"val/recall/{label}/dataloader_idx_{loader}"]
            assert recall == pytest.approx(float(right[targets == label].float().mean()))
    assert {"val/seen/dataloader_idx_0", "val/seen/dataloader_idx_1"} <= set(trainer.callback_metrics)


def test_classes_have_the_names_of_the_data_set(make_trainer: MakeTrainer) -> None:
    data = TensorDataset(IMAGES, CLASSES)
    data.classes = ["cat", "dog", "eel"]
    task = Task(nn.Linear(6, 3), [], lambda task, batch: task(batch[0]))
    make_trainer(report := ConfusionReport(verbose=False)).test(task, DataLoader(data, batch_size=4), verbose=False)
    assert report.report.adapted.class_names == ("cat", "dog", "eel")


def test_what_can_not_be_found_is_said_before_training(make_trainer: MakeTrainer) -> None:
    task = Task(nn.Linear(6, 3), [{"image": IMAGES, "species": CLASSES}])
    trainer = make_trainer(ConfusionReport(), max_epochs=1, max_steps=0)
    with pytest.warns(
        UserWarning, match=r"no targets were found in the batch, which is {image: \(8, 6\), species: \(8,\)}"
    ):
        trainer.fit(task)
    task = Task(nn.Linear(6, 3), [{"image": IMAGES, "label": torch.randn(8, 3)}])
    with pytest.warns(
        UserWarning,
        match=r"no logits of classes were found. The targets are \(8, 3\) of torch.float32; forward of Task",
    ):
        make_trainer(report := ConfusionReport()).test(task)
    assert report.report is None


def test_targets_that_are_no_class_are_named(make_trainer: MakeTrainer) -> None:
    task = Task(nn.Linear(6, 3), [{"image": IMAGES, "label": torch.tensor([0, 1, 2, 9, 0, 1, 2, -1])}])
    with pytest.warns(UserWarning, match=r"targets outside 0..2: -1, 9. .*ignore_index"):
        make_trainer(report := ConfusionReport(verbose=False)).test(task, verbose=False)
    assert report.report.adapted.total == 6


class TwoParts(pl.LightningModule):
    """Its step calls one child after the other, and never forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.head(self.encoder(batch[0]).relu())


def test_children_that_are_called_one_by_one_are_counted_without_the_base(make_trainer: MakeTrainer) -> None:
    loader = DataLoader([(IMAGES, CLASSES)], batch_size=None)
    trainer = make_trainer(LoRAFinetuning(rank=1), report := ConfusionReport(verbose=False))
    with pytest.warns(UserWarning, match="cannot report the base: the step of TwoParts"):
        trainer.test(model := TwoParts(), loader, verbose=False)
    assert report.report.base is None
    assert report.report.adapted.matrix.tolist() == matrix(
        model.head(model.encoder(IMAGES).relu()).argmax(1), CLASSES, 3
    )


def test_a_step_that_fails_leaves_the_module_as_it_was(make_trainer: MakeTrainer) -> None:
    def fail(task: Task, batch: Any) -> None:
        raise RuntimeError("out of luck")

    task = Task(nn.Linear(6, 3), [{"image": IMAGES, "label": CLASSES}], fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        make_trainer(ConfusionReport()).test(task)
    assert "forward" not in vars(task)
    assert not task.net._forward_hooks


class Logger(CSVLogger):
    """One with images, as those of W&B and Comet have."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.images: list[str] = []

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.images.append(key)


def test_any_logger_with_images_gets_the_figures(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    logger = Logger(tmp_path)
    make_trainer(ConfusionReport(verbose=False), logger=logger).test(own(), verbose=False)
    assert logger.images == ["test/confusion/model"]
