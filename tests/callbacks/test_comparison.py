"""`ComparisonReport`: any task, base beside adapted, in real passes over data."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MultilabelAveragePrecision
from torchmetrics.regression import MeanAbsoluteError, PearsonCorrCoef

from lora_lightning import ComparisonReport, ConfusionReport, LoRAConfig
from lora_lightning.evaluation import Confusion, Labels, Report, Values
from lora_lightning.lora import adapter_parameters, attach, disabled, merged
from tests import processes

MakeTrainer = Callable[..., Trainer]
SIZES = (1, 2, 7, 64)
N = 64


class Task(pl.LightningModule):
    """A user's module: a test step that returns nothing."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)


def adapted(net: nn.Module, by: float = 1.0) -> Task:
    """A task whose adapters do something."""
    attach(net, LoRAConfig(rank=2))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(net):
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return Task(net)


@pytest.fixture
def inputs() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(N, 6)


def evaluated(
    make_trainer: MakeTrainer, module: Task, inputs: Tensor, targets: Tensor, size: int = 7, **arguments: Any
) -> ComparisonReport:
    callback = ComparisonReport(verbose=False, **arguments)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=size)
    make_trainer(callback, logger=False).test(module, loader, verbose=False)
    return callback


def both(task: Task, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of the adapted model and of its base."""
    with torch.no_grad():
        after = task(inputs)
        with disabled(task):
            return after, task(inputs)


@pytest.mark.parametrize("size", SIZES)
def test_classes_are_counted_as_by_hand(make_trainer: MakeTrainer, inputs: Tensor, size: int) -> None:
    task, targets = adapted(nn.Linear(6, 4)), torch.arange(N) % 4
    report = evaluated(make_trainer, task, inputs, targets, size).report
    assert report is not None
    right = []
    for outputs, result in zip(both(task, inputs), (report.adapted, report.base), strict=True):
        matrix = torch.zeros(4, 4, dtype=torch.int64)
        for target, predicted in zip(targets, outputs.argmax(1), strict=True):
            matrix[target, predicted] += 1
        assert torch.equal(result.matrix, matrix)
        right.append(outputs.argmax(1) == targets)
    assert report.fixed == tuple((right[0] & ~right[1]).nonzero()[:, 0].tolist())
    assert report.broken == tuple((right[1] & ~right[0]).nonzero()[:, 0].tolist())
    assert report.fixed
    assert report.broken
    assert report.p_value == report.pairs.p


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
@pytest.mark.parametrize("size", SIZES)
def test_labels_are_counted_as_by_hand(make_trainer: MakeTrainer, inputs: Tensor, size: int, kind: str) -> None:
    net = nn.Sequential(nn.Linear(6, 3), nn.Sigmoid() if kind == "probabilities" else nn.Identity())
    task, targets = adapted(net), torch.randint(2, (N, 3)).float()
    report = evaluated(make_trainer, task, inputs, targets, size).report
    assert report.task == "multilabel"
    assert report.read_as == "labels: 3, from outputs (B, 3) and float targets (B, 3), all 0 or 1"
    exact = []
    for outputs, result in zip(both(task, inputs), (report.adapted, report.base), strict=True):
        predicted, true = outputs > (0.5 if kind == "probabilities" else 0), targets == 1
        assert isinstance(result, Labels)
        assert result.true_positives == (predicted & true).sum(0).tolist()
        assert result.false_positives == (predicted & ~true).sum(0).tolist()
        assert result.false_negatives == (~predicted & true).sum(0).tolist()
        assert result.true_negatives == (~predicted & ~true).sum(0).tolist()
        exact.append((predicted == true).all(1))
        assert result.accuracy == pytest.approx(float(exact[-1].float().mean()))
    assert report.fixed == tuple((exact[0] & ~exact[1]).nonzero()[:, 0].tolist())
    labels = [outputs > (0.5 if kind == "probabilities" else 0) for outputs in both(task, inputs)]
    samples = {each.index: each for each in report.pairs.samples}
    assert sorted(samples) == sorted([*report.fixed, *report.broken])
    for index, sample in samples.items():
        rows = (targets[index] == 1, labels[1][index], labels[0][index])
        assert sample.labels == [row.nonzero()[:, 0].tolist() for row in rows]
        assert sample.is_fixed is (index in report.fixed)


def fitted(make_trainer: MakeTrainer, task: Task, inputs: Tensor, targets: Tensor) -> dict[str, Any]:
    """What `run.json` says of the validations of a `fit` of two epochs."""
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=7)
    trainer = make_trainer(ComparisonReport(verbose=False), max_epochs=2)
    trainer.fit(task, loader, loader)
    return json.loads((Path(trainer.log_dir) / "run.json").read_text())["validations"]


@pytest.mark.parametrize("kind", ["classes", "regression"])
def test_a_fit_counts_its_base_in_the_first_validation(make_trainer: MakeTrainer, inputs: Tensor, kind: str) -> None:
    task = adapted(nn.Linear(6, 4))
    targets = torch.arange(N) % 4 if kind == "classes" else torch.randn(N, 4)
    base = both(task, inputs)[1]
    found = fitted(make_trainer, task, inputs, targets)
    after = both(task, inputs)[0]
    assert (found["samples"], len(found["each"])) == (N, 2)
    for outputs, number in ((base, found["base"]), (after, found["each"][-1])):
        if kind == "classes":
            assert number == int((outputs.argmax(1) != targets).sum())
        else:
            assert number == pytest.approx(float((outputs - targets).abs().mean()), rel=1e-5)


def test_a_base_that_fails_in_fit_costs_its_numbers_and_nothing_else(make_trainer: MakeTrainer, inputs: Tensor) -> None:
    task, targets = adapted(nn.Linear(6, 4)), torch.arange(N) % 4
    with disabled(task):
        base = task.net.weight.detach().clone()

    class Broken(Task):
        def forward(self, x: Tensor) -> Any:
            is_base = torch.equal(self.net.weight, base)
            if is_base and not self.training:
                raise RuntimeError("failed by the test")
            return self.net(x)

    found = fitted(make_trainer, Broken(task.net), inputs, targets)
    assert found["base"] is None
    assert len(found["each"]) == 2


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_values_are_measured_as_by_hand(make_trainer: MakeTrainer, inputs: Tensor, size: int, outputs: int) -> None:
    task, targets = adapted(nn.Linear(6, outputs)), 5 + torch.randn(N, outputs)
    report = evaluated(make_trainer, task, inputs, targets, size).report
    assert report.task == "regression"
    for predicted, result in zip(both(task, inputs), (report.adapted, report.base), strict=True):
        errors = predicted.double() - targets.double()
        spread = (targets.double() - targets.double().mean(0)).square().sum(0)
        assert isinstance(result, Values)
        assert result.mae == pytest.approx(float(errors.abs().mean()), rel=1e-6)
        assert result.rmse == pytest.approx(float(errors.square().mean(0).sqrt().mean()), rel=1e-6)
        assert result.bias == pytest.approx(float(errors.mean()), rel=1e-5)
        assert result.r2 == pytest.approx(1 - float((errors.square().sum(0) / spread).mean()), rel=1e-6)
        assert sum(result.table()["samples"]) == N
    after, before = ((each - targets).abs().mean(1) for each in both(task, inputs))
    assert report.improved[0] == int((after - before).argmin())
    assert report.worsened[0] == int((after - before).argmax())
    assert report.test.difference == pytest.approx(float((after - before).mean()), rel=1e-4)
    assert report.test.low < report.test.difference < report.test.high


def test_pixels_have_an_iou_by_class_and_a_bootstrap_over_images(make_trainer: MakeTrainer) -> None:
    torch.manual_seed(0)
    images, masks = torch.randn(12, 3, 8, 6), torch.randint(3, (12, 8, 6))
    task = adapted(nn.Conv2d(3, 3, 1))
    report = evaluated(make_trainer, task, images, masks, 5).report
    assert report.task == "segmentation"
    after, before = (each.argmax(1) for each in both(task, images))
    for label in range(3):
        common, either = (after == label) & (masks == label), (after == label) | (masks == label)
        assert report.adapted.iou[label] == pytest.approx(int(common.sum()) / int(either.sum()))
    change = (after == masks).double().mean((1, 2)) - (before == masks).double().mean((1, 2))
    assert report.test.difference == pytest.approx(float(change.mean()))
    assert report.p_value == report.test.p
    assert report.fixed is None


def test_metrics_of_the_user_are_computed_for_both_models(make_trainer: MakeTrainer, inputs: Tensor) -> None:
    targets = torch.arange(N) % 4
    task = adapted(nn.Linear(6, 4))
    metrics = MetricCollection({"top2": MulticlassAccuracy(4, top_k=2, average="micro")})
    report = evaluated(make_trainer, task, inputs, targets, metrics=metrics).report
    expected = [float(metrics["top2"](outputs, targets)) for outputs in both(task, inputs)]
    assert report.metrics == {"top2": pytest.approx(tuple(expected))}

    labels = torch.randint(2, (N, 3))
    task, metric = adapted(nn.Linear(6, 3)), MultilabelAveragePrecision(3)
    report = evaluated(make_trainer, task, inputs, labels, metrics=metric).report
    expected = [float(metric(outputs, labels)) for outputs in both(task, inputs)]
    assert report.metrics == {"MultilabelAveragePrecision": pytest.approx(tuple(expected))}
    # A loss wants floats, and the metric integers.
    assert evaluated(make_trainer, task, inputs, labels.float(), metrics=metric).report.metrics == report.metrics

    values = torch.randn(N)
    task, both_metrics = adapted(nn.Linear(6, 1)), MetricCollection([MeanAbsoluteError(), PearsonCorrCoef()])
    report = evaluated(make_trainer, task, inputs, values, metrics=both_metrics).report
    assert set(report.metrics) == {"MeanAbsoluteError", "PearsonCorrCoef"}
    assert report.metrics["MeanAbsoluteError"][0] == pytest.approx(report.adapted.mae)
    assert report.metrics["MeanAbsoluteError"][1] == pytest.approx(report.base.mae)


def test_a_metric_that_fails_does_not_end_the_run(make_trainer: MakeTrainer, inputs: Tensor) -> None:
    metric = MulticlassAccuracy(3)  # of a model of four classes
    with pytest.warns(UserWarning, match="The metrics are not computed: "):
        report = evaluated(make_trainer, adapted(nn.Linear(6, 4)), inputs, torch.arange(N) % 4, metrics=metric).report
    assert report.metrics == {}
    assert report.adapted.total == N


@pytest.mark.parametrize("kind", ["classes", "values"])
def test_metrics_of_the_user_stand_everywhere_with_their_difference(
    make_trainer: MakeTrainer, inputs: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    task = adapted(nn.Linear(6, 4 if kind == "classes" else 1))
    targets = torch.arange(N) % 4 if kind == "classes" else torch.randn(N)
    metric = MulticlassAccuracy(4, top_k=2, average="micro") if kind == "classes" else PearsonCorrCoef()
    callback = ComparisonReport(metrics=MetricCollection({"<b>mine</b>": metric, "other": metric.clone()}))
    make_trainer(callback).test(task, DataLoader(TensorDataset(inputs, targets), batch_size=7), verbose=False)
    after, before = (float(metric(outputs.squeeze(1), targets)) for outputs in both(task, inputs))
    found = callback.report.metrics["<b>mine</b>"]
    assert (found.adapted, found.base) == pytest.approx((after, before))
    assert found.difference == pytest.approx(after - before)
    assert found.difference != 0
    printed = " ".join(capsys.readouterr().out.split())
    for name in ("<b>mine</b>", "other"):
        assert f"{name}: {before:.3g} → {after:.3g} ({after - before:+.3g})" in printed
    path = next(tmp_path.rglob("confusion.json" if kind == "classes" else "comparison.json"))
    content = json.loads(path.read_text())["metrics"]["other"]
    assert content == {"base": found.base, "adapted": found.adapted, "difference": found.difference}
    page = path.with_name("report.html").read_text()
    assert "Your metrics" in page
    assert "&lt;b&gt;mine&lt;/b&gt;" in page
    assert f"{abs(found.difference):.3g}" in page
    shown = callback.report._repr_html_()
    assert f"{found.base:#.4g}</td><td>{found.adapted:#.4g}</td><td>{found.difference:+#.4g}" in shown


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_have_a_table_and_files(
    make_trainer: MakeTrainer, inputs: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: float
) -> None:
    task, targets = adapted(nn.Linear(6, 3)), torch.randn(N, 3)
    with torch.no_grad():
        task.net.bias[1] = wrong
    callback = ComparisonReport()
    make_trainer(callback).test(task, DataLoader(TensorDataset(inputs, targets), batch_size=7), verbose=False)
    assert not math.isfinite(callback.report.adapted.mae), "an output without a number is not left out"
    assert "mae" in capsys.readouterr().out
    content = json.loads(next(tmp_path.rglob("comparison.json")).read_text())
    assert content["model"]["mae"] is None
    assert next(tmp_path.rglob("report.html")).is_file()


class InPlace(nn.Module):
    """Normalizes its input in place, as some networks do, and adds noise."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).div_(0.1)
        return self.layer(x) + torch.randn(len(x), 4)


def test_untrained_adapters_give_the_same_matrix_whatever_forward_does_to_its_input(
    make_trainer: MakeTrainer, inputs: Tensor
) -> None:
    net = InPlace()
    attach(net, LoRAConfig(rank=2))
    torch.manual_seed(1)
    report = evaluated(make_trainer, Task(net), inputs.clone(), torch.arange(N) % 4).report
    with_report = torch.rand(1)
    assert torch.equal(report.adapted.matrix, report.base.matrix)
    assert (report.fixed, report.broken) == ((), ())
    torch.manual_seed(1)
    make_trainer(logger=False).test(
        Task(net), DataLoader(TensorDataset(inputs.clone(), torch.arange(N) % 4), batch_size=7), verbose=False
    )
    assert torch.equal(torch.rand(1), with_report), "the run keeps its random numbers"


def test_the_base_is_that_without_adapters_in_a_merged_model(make_trainer: MakeTrainer, inputs: Tensor) -> None:
    task, targets = adapted(nn.Linear(6, 4)), torch.arange(N) % 4
    plain = evaluated(make_trainer, task, inputs, targets).report
    with merged(task.net):
        inside = evaluated(make_trainer, task, inputs, targets).report
    assert torch.equal(plain.base.matrix, inside.base.matrix)


def test_a_report_is_a_table_for_pandas_and_a_page_for_a_notebook(make_trainer: MakeTrainer, inputs: Tensor) -> None:
    task, targets = adapted(nn.Linear(6, 4)), torch.arange(N) % 4
    names = ["<b>cat</b>", "dog", "eel", "x" * 5000]
    callback = evaluated(make_trainer, task, inputs, targets, class_names=names)
    table = callback.report.table()
    assert table["class"] == names
    assert table["recall_adapted"] == callback.report.adapted.recall
    assert table["recall_base"] == callback.report.base.recall
    assert {len(column) for column in table.values()} == {4}
    page = callback._repr_html_()
    assert "<b>cat</b>" not in page
    assert "&lt;b&gt;cat&lt;/b&gt;" in page
    assert "classes: 4, from logits (B, 4) and integer targets (B)" in page
    assert len(page) < 10_000
    assert "nothing counted yet" in ComparisonReport()._repr_html_()


def test_the_indices_are_unknown_if_the_loader_shuffles(make_trainer: MakeTrainer, inputs: Tensor) -> None:
    callback = ComparisonReport(verbose=False)
    loader = DataLoader(TensorDataset(inputs, torch.arange(N) % 4), batch_size=7, shuffle=True)
    with pytest.warns(UserWarning, match="shuffl"):
        make_trainer(callback, logger=False).test(adapted(nn.Linear(6, 4)), loader, verbose=False)
    assert callback.report.pairs.fixed > 0
    assert callback.report.fixed is callback.report.broken is None


@pytest.mark.parametrize("kind", ["multilabel", "regression"])
def test_other_tasks_have_a_table_files_and_logged_numbers(
    make_trainer: MakeTrainer, inputs: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    targets = torch.randn(N, 3) if kind == "regression" else torch.randint(2, (N, 3))
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=7)
    task, callback = adapted(nn.Linear(6, 3)), ComparisonReport()
    trainer = make_trainer(callback, max_epochs=1, limit_train_batches=1)
    trainer.fit(task, loader, loader)
    assert {"val/mae" if kind == "regression" else "val/micro_f1"} <= set(trainer.callback_metrics)
    trainer.test(task, loader, verbose=False)
    printed = capsys.readouterr().out
    assert callback.report.read_as in printed
    assert ("mae" if kind == "regression" else "micro_f1") in printed
    (path,) = tmp_path.rglob("comparison.json")
    content = json.loads(path.read_text())
    assert (content["task"], content["samples"], content["p_value"]) == (kind, N, callback.report.p_value)
    with path.with_suffix(".csv").open() as file:
        assert len(list(csv.DictReader(file))) == (5 if kind == "regression" else 3)
    assert not list(tmp_path.rglob("confusion*"))
    page = path.with_name("report.html").read_text()
    assert callback.report.read_as in page
    assert ("paired bootstrap over samples" if kind == "regression" else " samples were fixed and ") in page


def test_a_confusion_report_counts_no_other_task_and_says_so(make_trainer: MakeTrainer, inputs: Tensor) -> None:
    for targets, words in (
        (torch.randn(N, 3), "values: 3 per sample"),
        (torch.randint(2, (N, 3)), "labels: 3"),
    ):
        callback = ConfusionReport(verbose=False)
        loader = DataLoader(TensorDataset(inputs, targets), batch_size=1)
        with pytest.warns(UserWarning, match=f"counts nothing: .* These are {words}.*ComparisonReport reports them"):
            make_trainer(callback).test(Task(nn.Linear(6, 3)), loader, verbose=False)
        assert callback.report is None


def test_what_can_not_be_known_is_asked(make_trainer: MakeTrainer) -> None:
    tokens, targets = torch.randn(8, 5, 6), torch.randint(5, (8, 5))
    task = Task(nn.Linear(6, 5))
    with pytest.warns(UserWarning, match='counts nothing: two dimensions are equal: set task to "tokens"'):
        assert evaluated(make_trainer, task, tokens, targets).report is None
    report = evaluated(make_trainer, task, tokens, targets, task="tokens").report
    assert report.adapted.matrix.sum() == 40
    assert isinstance(report.adapted, Confusion)
    with pytest.raises(ValueError, match="task='ages': expected one of classes"):
        ComparisonReport(task="ages")
    with pytest.raises(ValueError, match="task='regression': expected one of classes"):
        ConfusionReport(task="regression")


class Nested(nn.Module):
    """Returns its outputs where nobody looks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        return [[{"first": self.layer(x)}]]


def test_what_is_not_found_is_said(make_trainer: MakeTrainer, inputs: Tensor) -> None:
    with pytest.warns(UserWarning, match=r"counts nothing: no logits of classes were found\. .* returned \[\[\{first"):
        assert evaluated(make_trainer, Task(Nested()), inputs, torch.arange(N) % 4).report is None
    callback = ComparisonReport(verbose=False)
    boxes = [(row, {"boxes": torch.rand(2, 4), "labels": torch.arange(2)}) for row in inputs[:4]]
    loader = DataLoader(boxes, batch_size=2, collate_fn=lambda batch: (torch.stack([x for x, _ in batch]), list(batch)))
    with pytest.warns(UserWarning, match="counts nothing: no targets were found .* which have to be a tensor"):
        make_trainer(callback, logger=False).test(Task(nn.Linear(6, 4)), loader, verbose=False)
    assert callback.report is None


SCRIPT = """
import sys, warnings, json, torch
warnings.simplefilter("ignore")
from torch.utils.data import DataLoader, TensorDataset
from lightning.pytorch import Trainer
from torchmetrics.regression import MeanAbsoluteError
from torchmetrics.classification import MulticlassAccuracy
from lora_lightning import ComparisonReport
from lora_lightning.data.samplers import UnrepeatedSampler
from tests.callbacks.test_comparison import adapted, nn
torch.manual_seed(0)
inputs, devices = torch.randn(65, 6), int(sys.argv[1])
found = {}
for kind, targets, outputs in (
    ("classes", torch.arange(65) % 4, 4),
    ("values", torch.randn(65), 1),
    ("labels", torch.randint(2, (65, 3)), 3),
):
    torch.manual_seed(1)
    task = adapted(nn.Linear(6, outputs))
    metric = {"classes": MulticlassAccuracy(4), "values": MeanAbsoluteError(), "labels": None}[kind]
    callback = ComparisonReport(verbose=False, metrics=metric)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
        callbacks=[callback], enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=kind == "labels",
    )
    data = TensorDataset(inputs, targets)
    sampler = (
        UnrepeatedSampler(65, num_replicas=devices, rank=trainer.global_rank)
        if devices > 1 and kind != "labels"
        else None
    )
    trainer.test(task, DataLoader(data, batch_size=1, sampler=sampler), verbose=False)
    report = callback.report
    found[kind] = [
        report.adapted.as_dict(), report.base.as_dict(), report.p_value, report.fixed, report.broken,
        sorted(report.improved), report.metrics,
    ]
if trainer.is_global_zero:
    print("FOUND" + json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 3])
def test_the_numbers_are_the_same_on_any_number_of_devices(devices: int, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(number: int) -> Any:
        output = processes.run("script.py", str(number), folder=tmp_path, devices=number)
        (line,) = (line for line in output.splitlines() if line.startswith("FOUND"))
        return json.loads(line.removeprefix("FOUND"))

    one, several = run(1), run(devices)
    for kind in one:
        *numbers, metrics = one[kind]
        *others, other_metrics = several[kind]
        assert numbers == others
        assert all(other_metrics[name] == pytest.approx(values) for name, values in metrics.items())


def test_reports_of_hand_made_counts_have_no_indices() -> None:
    report = Report("test", Confusion(torch.eye(2, dtype=torch.int64), ("a", "b")))
    assert (report.fixed, report.broken, report.p_value) == (None, None, None)
    assert report.model is report.adapted


class Fragile(nn.Module):
    """Works once per step, and not a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 4:
            raise RuntimeError("not again")
        return self.layer(x)


def test_a_base_that_fails_does_not_end_the_run(make_trainer: MakeTrainer, inputs: Tensor) -> None:
    net = Fragile()
    attach(net, LoRAConfig(rank=2))
    with pytest.warns(UserWarning, match="ComparisonReport counts nothing: RuntimeError: not again"):
        callback = evaluated(make_trainer, Task(net), inputs, torch.arange(N) % 4)
    assert callback.report is None


def test_class_names_of_any_kind_are_text_everywhere(
    make_trainer: MakeTrainer, inputs: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["[red]</script><b>", "\x1b[31mred\x07", "half \ud83d of a pair", "x" * 5000 + "$x_{"]
    callback = ComparisonReport(names)
    loader = DataLoader(TensorDataset(inputs, torch.arange(N) % 4), batch_size=7)
    make_trainer(callback).test(adapted(nn.Linear(6, 4)), loader, verbose=False)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\x07" not in printed
    assert "[red]" in printed
    assert max(map(len, printed.splitlines())) < 200
    page = next(tmp_path.rglob("report.html")).read_text()
    assert "</script><b>" not in page
    assert len(page) < 100_000
    assert {"confusion.json", "confusion.csv", "confusion.png", "difference.png"} <= {
        path.name for path in next(tmp_path.rglob("confusion.json")).parent.iterdir()
    }


def test_class_names_of_any_kind_can_be_logged_and_stand_in_warnings_as_text(
    make_trainer: MakeTrainer, inputs: Tensor, tmp_path: Path
) -> None:
    names = ["x" * 5000 + str(number) for number in range(4)]
    callback, logger = ComparisonReport(names, verbose=False), CSVLogger(tmp_path)
    loader = DataLoader(TensorDataset(inputs, torch.arange(N) % 4), batch_size=64)
    trainer = make_trainer(callback, logger=logger, max_epochs=1)
    task = adapted(nn.Linear(6, 4))
    trainer.fit(task, loader, loader)
    logged = [name for name in trainer.callback_metrics if name.startswith("val/recall/")]
    trainer.test(task, loader, verbose=False)
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        columns = csv.DictReader(file).fieldnames
    assert len(logged) == 4
    assert len([name for name in columns if name.startswith("test/base_recall/")]) == 4
    assert max(map(len, [*logged, *columns])) < 200
    with pytest.warns(UserWarning, match="class names .* do not fit") as caught:
        evaluated(make_trainer, task, inputs, torch.arange(N) % 4, class_names=["\x1b[31mred", "y" * 5000])
    (said,) = (str(each.message) for each in caught if "do not fit" in str(each.message))
    assert "\x1b" not in said
    assert len(said) < 400


@pytest.mark.parametrize("task", [None, "next_tokens"])
def test_a_large_vocabulary_is_counted_without_a_matrix_of_its_size(
    make_trainer: MakeTrainer, tmp_path: Path, task: str | None
) -> None:
    words = 50_000
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(words, 4), nn.Linear(4, words))
    module = adapted(net)
    tokens = torch.randint(words, (20, 6))
    targets = tokens if task else torch.randint(words, (20, 6)).masked_fill(torch.rand(20, 6) < 0.2, -100)
    callback = ComparisonReport(task=task)
    make_trainer(callback).test(module, DataLoader(TensorDataset(tokens, targets), batch_size=3), verbose=False)
    for outputs, result in zip(both(module, tokens), (callback.report.adapted, callback.report.base), strict=True):
        predicted = outputs.argmax(2)
        pairs = (predicted[:, :-1], targets[:, 1:]) if task else (predicted, targets)
        known = pairs[1] != -100
        assert result.total == int(known.sum())
        assert sum(result.correct) == int((pairs[0] == pairs[1])[known].sum())
        assert sorted(zip(*(each.tolist() for each in result.cells[:2]), strict=True)) == sorted(
            set(zip(pairs[1][known].tolist(), pairs[0][known].tolist(), strict=True))
        )
        assert result.matrix.is_sparse
    folder = next(tmp_path.rglob("report.html")).parent
    assert (folder / "report.html").stat().st_size < 3_000_000
    with (folder / "counts.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["base"]) for row in rows) == callback.report.base.total
    assert sum(int(row["adapted"]) for row in rows) == callback.report.adapted.total


MEMORY = """
import json, resource, sys, warnings
warnings.simplefilter("ignore")
from tests.benchmarks.report_memory import evaluate
print("FOUND" + json.dumps(evaluate(sys.argv[1], classes=1000, samples=100_000, reports=sys.argv[2] == "1")))
"""


@pytest.mark.slow
def test_a_thousand_classes_and_many_samples_need_little_memory_and_a_small_page(tmp_path: Path) -> None:
    root, script = Path(__file__).parents[2], tmp_path / "memory.py"
    script.write_text(MEMORY)
    found = []
    for reports in "01":
        words = [sys.executable, str(script), str(tmp_path / reports), reports]
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(root)},
            check=False,
            timeout=600,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
        assert lines, done.stderr
        found.append(json.loads(lines[0].removeprefix("FOUND")))
    without, with_report = found
    assert with_report["peak MB"] - without["peak MB"] < 200
    assert with_report["page MB"] < 3
