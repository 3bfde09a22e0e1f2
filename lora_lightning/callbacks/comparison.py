"""Defines `ComparisonReport`, which compares a model with its base."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

from lora_lightning.callbacks.finished_bar import finish_bar
from lora_lightning.callbacks.log_folder import log_folder
from lora_lightning.callbacks.logged_results import log_outcome_of_fit, log_report, log_settings, show_charts
from lora_lightning.callbacks.merging import finetuning_of
from lora_lightning.callbacks.run_files import RecordedMetrics, facts_of_verdict, write_facts, write_run_page
from lora_lightning.callbacks.trained import TrainedModel
from lora_lightning.callbacks.validations import Validations
from lora_lightning.evaluation import TASKS, Confusion, Evaluation, EvaluationSettings, Report
from lora_lightning.report import report_table
from lora_lightning.report.figure import report_figures
from lora_lightning.report.files import write_report
from lora_lightning.report.terminal import show, show_sentence
from lora_lightning.report.verdict import verdict_of
from lora_lightning.wording import as_typed


class ComparisonReport(Callback):
    """Reports what a model gets right and wrong, for any task. If the model has adapters, it also reports its base.

    In `test` and `validate`, one pass over the data produces a table and a verdict in the terminal, and files in the
    log folder of the run. For classes, these are `confusion.json`, `confusion.csv`, images of the matrices, the samples
    that changed, and `report.html`; for other tasks `comparison.json` and `comparison.csv`. Loggers other than
    TensorBoard receive the numbers. During `fit`, each validation logs the recall of every class as
    `val/recall/<class>`, or for more than 20 classes their mean as `val/mean_recall`, or the numbers of another task.
    `metrics.csv`, `curves.png` and the report are written at the end. For more than 20 classes, the table, the figures
    and the scalars contain the 20 with the lowest recall; the number of classes is not limited. Counts are exact on any
    number of devices. Each data loader has its own report.

    The module does not need to return or log anything. The outputs are those of `forward` of the module in the step, or
    of one of its children: a tensor, or an object, mapping or tuple with a tensor. The outputs of the base come from
    the same call with the adapters disabled and a copy of the arguments, and the step runs once. The targets are the
    second element of the batch, or its entry `labels`, `label`, `targets`, `target`, `y` or `mask`.

    The task follows from the dtypes, shapes and values of all batches, never from a single one, and is named in one
    line. While several readings are possible, all are counted. If it can not be known, a warning asks for `task`, and
    nothing is counted.

    Args:
        class_names: Names of the classes or labels. The default is `class_names` of the data module, `classes` of the
            data set, or numbers.
        verbose: Whether to print the table, below it the verdict of `report.html`, and the path of that file.
        target_key: Key or position of the targets in a batch, if it differs from the above.
        ignore_index: Target to ignore in addition to -100. The default is the hyper-parameter of this name of the
            module, if any.
        task: `"classes"`, `"tokens"` (classes last), `"next_tokens"` (shifted by one), `"segmentation"` (classes
            second), `"multilabel"` or `"regression"`, if it is not to be found out.
        output_key: Key, attribute or position of the outputs in the output of the model, if it has several that fit.
        metrics: Metrics of torchmetrics to compute for the adapted model and its base. They receive outputs of shape
            (N, C), (N, K) or (N,), and targets of shape (N,) or (N, K), without those to ignore. Labels are integers.
            The table, the files, the page and `report.metrics` have both numbers and their difference.
        against: Which of the active adapters the base of the report has: `None` for none, `"frozen"` for those that are
            not trained, or a list of their names.

    Attributes:
        reports: The latest `Report` of each data loader in `test` or `validate`, on every device.
        report: The first of these reports, or `None` before.
        trained: A description of what the last `fit` trained, or `None` before. A notebook shows it as a table.
        settings: Further settings to log as hyper-parameters beside those of the adapters.

    Raises:
        ValueError: If there is no task of this name.
    """

    tasks: ClassVar[tuple[str, ...]] = TASKS
    """The tasks that are reported. Others are named in a warning."""

    def __init__(
        self,
        class_names: list[str] | None = None,
        verbose: bool = True,
        target_key: str | int | None = None,
        ignore_index: int | None = None,
        task: str | None = None,
        output_key: str | int | None = None,
        metrics: MetricCollection | Metric | None = None,
        against: list[str] | str | None = None,
    ) -> None:
        if task is not None and task not in self.tasks:
            raise ValueError(f"task={task!r}: expected one of {', '.join(self.tasks)}.")
        self.verbose = verbose
        self.reports: list[Report] = []
        self.trained: TrainedModel | None = None
        self.settings: dict[str, object] = {}
        self._validations = Validations()
        self._has_charts = False
        self._page: Path | None = None
        self._evaluation = Evaluation(
            EvaluationSettings(
                type(self).__name__,
                self.tasks,
                class_names,
                target_key,
                ignore_index,
                task,
                output_key,
                metrics,
                against,
            )
        )
        self._metrics = RecordedMetrics()

    @property
    def report(self) -> Report | None:
        """Return the latest report of the first data loader."""
        return self.reports[0] if self.reports else None

    def _repr_html_(self) -> str:
        """Return what was trained and the latest reports for a notebook."""
        found = "" if self.trained is None else self.trained._repr_html_()
        found += "".join(each._repr_html_() for each in self.reports)
        return found or f"<p>{type(self).__name__}: nothing counted yet. Call <code>trainer.test</code>.</p>"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        log_settings(trainer, pl_module)
        self._page = None

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._page is not None and self.verbose:
            finish_bar(trainer, pl_module)
            rank_zero_info(f"Report: {as_typed(self._page)}")
        self._page = None

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation.start()

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation.start()
        self._evaluation.compares_in_fit = not trainer.sanity_checking and self._validations.last is None

    @override
    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self._evaluation.record(trainer, pl_module)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self._evaluation.record(trainer, pl_module)

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluation.count(trainer, pl_module, batch, dataloader_idx)

    @override
    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self.on_test_batch_end(trainer, pl_module, *args, **kwargs)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._evaluation.stop()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._metrics = RecordedMetrics()
        self._validations, self._has_charts = Validations(), False

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self._metrics.after_batch(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._metrics.after_epoch(trainer, pl_module)
        if self._validations.last is not None:
            self._show_charts(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._metrics.after_validation(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trained = TrainedModel.of(trainer, pl_module, finetuning_of(trainer))
        self._show_charts(trainer)
        log_outcome_of_fit(trainer, pl_module, self._validations.last)
        self._metrics.write(trainer, pl_module, self._validations.facts())

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module, "test", trainer.test_dataloaders)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._finish(trainer, pl_module, "val", trainer.val_dataloaders)
            return
        reports = self._evaluation.reports(trainer, pl_module, "val", trainer.val_dataloaders)
        if trainer.sanity_checking:
            return
        if reports:
            self._validations.add(reports[0], self._evaluation.compares_in_fit)
        for report in reports:
            found = {f"val/{name}{report.suffix}": value for name, value in _to_log_in_fit(report).items()}
            pl_module.log_dict(found, sync_dist=True, add_dataloader_idx=False)  # the suffix names the loader

    def _finish(self, trainer: Trainer, pl_module: LightningModule, stage: str, loaders: Any) -> None:
        self.reports = self._evaluation.reports(trainer, pl_module, stage, loaders)
        folder = log_folder(trainer)
        if not trainer.is_global_zero:
            return
        if not self.reports:
            return
        facts = facts_of_verdict(trainer, pl_module)
        if folder is not None:
            facts = write_facts(trainer, pl_module, folder)
        for report in self.reports:
            try:
                self._write(trainer, pl_module, report, folder, facts)
            except Exception as error:  # noqa: BLE001 - a report must not cost the run
                rank_zero_warn(f"The report could not be written: {type(error).__name__}: {error}")
        if folder is not None:
            self._page = write_run_page(folder)

    def _write(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        report: Report,
        folder: str | None,
        facts: Mapping[str, Any],
    ) -> None:
        has_figures = isinstance(report.adapted, Confusion) and (folder is not None or trainer.loggers)
        figures = report_figures(report) if has_figures else {}
        if folder is not None:
            write_report(report, folder, figures)
        if self.verbose:
            show(report.read_as, markup=False, highlight=False, soft_wrap=True)
            show(report_table(report, report.suffix.strip("/") or None))
            show_sentence(verdict_of(report, facts).in_words())
        log_report(trainer, pl_module, report, figures, self.settings)

    def _show_charts(self, trainer: Trainer) -> None:
        """Write the charts of TensorBoard once, when the names of all metrics are known."""
        if not self._has_charts:
            self._has_charts = True
            show_charts(trainer)


def _to_log_in_fit(report: Report) -> dict[str, float]:
    """Return the recall of each class or their mean, or the numbers of another task."""
    if not isinstance(report.adapted, Confusion):
        return {name: value for name, value in report.adapted.summary().items() if not isnan(value)}
    return report.adapted.recall_to_log()
