"""Defines `ComparisonReport`, which compares a model with its base."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

from lora_lightning.callbacks.logged_results import log_report, log_settings, show_classes_as_one_chart
from lora_lightning.callbacks.run_files import RecordedMetrics, log_folder, write_facts
from lora_lightning.evaluation.confusion import SHOWN_CLASSES, Confusion
from lora_lightning.evaluation.datasets import (
    data_parallel_group,
    decoder,
    names_of_classes,
    sample_indices,
    warn_of_repeated_samples,
)
from lora_lightning.evaluation.decision import LoaderCounts, Question, Stream, sum_over_devices
from lora_lightning.evaluation.found import Candidate, candidates, described, find_targets
from lora_lightning.evaluation.metrics import UserMetrics, collection_of
from lora_lightning.evaluation.reading import MOST_CLASSES, Batch, Context, Sources
from lora_lightning.evaluation.recorded_calls import Call, RecordedCalls
from lora_lightning.evaluation.report import Report
from lora_lightning.evaluation.results import loggable
from lora_lightning.evaluation.tasks import TASKS
from lora_lightning.evaluation.text_inputs import TextInputs
from lora_lightning.lora import adapter_parameters, disabled, is_adapted
from lora_lightning.report import report_table
from lora_lightning.report.figure import report_figures
from lora_lightning.report.files import write_report
from lora_lightning.report.terminal import show
from lora_lightning.wording import some_of


class ComparisonReport(Callback):
    """Reports what a model gets right and wrong, for any task. If the model has adapters, it also reports its base.

    In `test` and `validate`, one pass over the data produces a table in the terminal and files in the log folder of the run. For
    classes, these are `confusion.json`, `confusion.csv`, images of the matrices, the samples that changed, and `report.html`; for
    other tasks `comparison.json` and `comparison.csv`. Loggers other than TensorBoard receive the numbers. During `fit`, each
    validation logs the recall of every class as `val/recall/<class>`, or for more than 20 classes their mean as `val/mean_recall`, or the
    numbers of another task. `metrics.csv`, `curves.png` and the report are written at the end. For more than 20 classes, the table, the
    figures and the scalars contain the 20 with the lowest recall. Counts are exact on any number of devices. Each data loader has its
    own report.

    The module does not need to return or log anything. The outputs are those of `forward` of the module in the step, or of one of its
    children: a tensor, or an object, mapping or tuple with a tensor. The outputs of the base come from the same call with the adapters
    disabled and a copy of the arguments, and the step runs once. The targets are the second element of the batch, or its entry `labels`,
    `label`, `targets`, `target`, `y` or `mask`.

    The task follows from the dtypes, shapes and values of all batches, never from a single one, and is named in one line. While
    several readings are possible, all are counted. If it can not be known, a warning asks for `task`, and nothing is counted.

    Args:
        class_names: Names of the classes or labels. The default is `class_names` of the data module, `classes` of the data set, or numbers.
        verbose: Whether to print the table.
        target_key: Key or position of the targets in a batch, if it differs from the above.
        ignore_index: Target to ignore in addition to -100. The default is the hyper-parameter of this name of the module, if any.
        task: `"classes"`, `"tokens"` (classes last), `"next_tokens"` (shifted by one), `"segmentation"` (classes second), `"multilabel"`
            or `"regression"`, if it is not to be found out.
        output_key: Key, attribute or position of the outputs in the output of the model, if it has several that fit.
        metrics: Metrics of torchmetrics to compute for the adapted model and its base. They receive outputs of shape (N, C), (N, K) or
            (N,), and targets of shape (N,) or (N, K), without those to ignore.

    Attributes:
        reports: The latest `Report` of each data loader in `test` or `validate`, on every device.
        report: The first of these reports, or `None` before.

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
    ) -> None:
        if task is not None and task not in self.tasks:
            raise ValueError(f"task={task!r}: expected one of {', '.join(self.tasks)}.")
        self.class_names = class_names
        self.verbose = verbose
        self.target_key = target_key
        self.ignore_index = ignore_index
        self.task = task
        self.output_key = output_key
        self.reports: list[Report] = []
        collection = collection_of(metrics)
        self._user_metrics = None if collection is None else UserMetrics(collection)
        self._counts: dict[int, LoaderCounts] = {}
        """The counts by the number of the loader."""
        self._texts = TextInputs()
        self._recorded: RecordedCalls | None = None
        self._metrics = RecordedMetrics()
        self._warned: set[str] = set()
        self._unread = ""
        """Description of the first batch that could not be read."""

    @property
    def report(self) -> Report | None:
        """Return the latest report of the first data loader."""
        return self.reports[0] if self.reports else None

    def _repr_html_(self) -> str:
        """Return the latest reports for a notebook."""
        found = "".join(each._repr_html_() for each in self.reports)
        return found or f"<p>{type(self).__name__}: nothing counted yet. Call <code>trainer.test</code>.</p>"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        log_settings(trainer, pl_module)

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counts, self._texts = {}, TextInputs()

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counts, self._texts = {}, TextInputs()

    @override
    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self._record(trainer, pl_module)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self._record(trainer, pl_module)

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
        self._count(trainer, pl_module, batch, dataloader_idx)

    @override
    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self.on_test_batch_end(trainer, pl_module, *args, **kwargs)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_recording()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._metrics = RecordedMetrics()
        show_classes_as_one_chart(trainer)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self._metrics.after_batch(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._metrics.after_epoch(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._metrics.after_validation(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._metrics.write(trainer, pl_module)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module, "test", trainer.test_dataloaders)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._finish(trainer, pl_module, "val", trainer.val_dataloaders)
            return
        reports = self._gathered(trainer, pl_module, "val", trainer.val_dataloaders)
        for report in reports if not trainer.sanity_checking else ():
            found = {f"val/{name}{report.suffix}": value for name, value in _to_log_in_fit(report).items()}
            pl_module.log_dict(found, sync_dist=True, add_dataloader_idx=False)  # the suffix names the loader

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_recording()
        self._recorded = RecordedCalls(pl_module, trainer.state.fn != "fit" and is_adapted(pl_module))

    def _stop_recording(self) -> list[Call]:
        recorded, self._recorded = self._recorded, None
        return recorded.stop() if recorded else []

    def _count(self, trainer: Trainer, pl_module: LightningModule, batch: Any, loader: int) -> None:
        calls = self._stop_recording()
        targets = find_targets(batch, self.target_key)
        if targets is None:
            what = f" under {self.target_key!r}" if self.target_key is not None else ""
            self._warn(
                f"{type(self).__name__} counts nothing: no targets{what} were found in the batch, which is {described(batch)}. Set "
                "target_key to the key or position of the targets."
            )
            return
        if loader not in self._counts:
            metrics = None if trainer.state.fn == "fit" else self._user_metrics
            self._counts[loader] = LoaderCounts(self.task, metrics)
        counts = self._counts[loader]
        own = [call for call in calls if call.module is pl_module]
        if not self._unread:
            returned = ", ".join(described(call.output) for call in own or calls) or "nothing, as it was not called"
            called = "forward" if own or not calls else "what the step called"
            self._unread = f"The targets are {described(targets)} of {targets.dtype}; {called} of {type(pl_module).__name__} returned {returned}"
        found = self._find(pl_module, counts, own or list(reversed(calls)), targets)
        if found is None:
            return
        call, outputs, seen = found
        base = self._base_outputs(trainer, pl_module, call, calls)
        loaders = trainer.test_dataloaders if trainer.state.fn == "test" else trainer.val_dataloaders
        data_loader = _number(loaders, loader)
        replicas = trainer.world_size if data_parallel_group(trainer) is None else 0
        indices = sample_indices(data_loader, counts.samples, len(targets), replicas)
        counts.update(outputs, seen, base, Sources(batch, decoder(trainer), indices))

    def _find(
        self, pl_module: LightningModule, counts: LoaderCounts, calls: list[Call], targets: Tensor
    ) -> tuple[Call, list[Candidate], Batch] | None:
        """Return the call with the outputs, the candidates for them, and what is known of the batch."""
        ignored = self.ignore_index
        if ignored is None and isinstance(named := pl_module.hparams.get("ignore_index"), int):
            ignored = named
        possible = []
        for call in calls:
            outputs = [
                Candidate(each.place, each.tensor.detach(), each.is_named)
                for each in candidates(call.output, self.output_key)
            ]
            is_text, is_next = self._texts.look(call, targets)
            seen = Batch(targets, targets, ignored, is_text, is_next)
            if outputs:
                possible.append((call, outputs, seen))
        fitting = (each for each in possible if len(possible) == 1 or counts.fits(each[1], each[2]))
        return next(fitting, possible[0] if possible else None)

    def _base_outputs(
        self, trainer: Trainer, pl_module: LightningModule, call: Call, calls: list[Call]
    ) -> list[Candidate] | None:
        if trainer.state.fn == "fit" or not is_adapted(pl_module):
            return None
        if call.module is not pl_module and not _holds_all_adapters(call, calls, pl_module):
            self._warn(
                f"{type(self).__name__} cannot report the base: the step of {type(pl_module).__name__} calls several "
                "of its modules, and the input of one depends on the adapters of another. Call them in forward, and self(...) in the step."
            )
            return None
        with disabled(pl_module), trainer.precision_plugin.forward_context():
            return candidates(call.again(), self.output_key)

    def _finish(self, trainer: Trainer, pl_module: LightningModule, stage: str, loaders: Any) -> None:
        self.reports = self._gathered(trainer, pl_module, stage, loaders)
        folder = log_folder(trainer)
        if not trainer.is_global_zero:
            return
        for report in self.reports:
            has_figures = isinstance(report.adapted, Confusion) and (folder is not None or trainer.loggers)
            figures = report_figures(report) if has_figures else {}
            if folder is not None:
                write_report(report, folder, figures)
            if self.verbose:
                show(report.read_as, markup=False, highlight=False, soft_wrap=True)
                show(report_table(report, report.suffix.strip("/") or None))
            log_report(trainer, pl_module, report, figures)
        if folder is not None and self.reports:
            write_facts(trainer, pl_module, folder)

    def _gathered(self, trainer: Trainer, pl_module: LightningModule, stage: str, loaders: Any) -> list[Report]:
        """Return the reports over all devices. Every device has to call this, even without samples."""
        group = data_parallel_group(trainer)
        own = {loader: dict(each.streams) for loader, each in self._counts.items()}
        summed, repeated = sum_over_devices(self._counts, group)
        reports = []
        for number, counts in summed.items():
            dataset = getattr(_number(loaders, number), "dataset", None)
            chosen = counts.decide(self._number_of_classes(trainer, pl_module, dataset))
            if not isinstance(chosen, Stream) or chosen.reading.task not in self.tasks:
                self._explain(counts, chosen)
                continue
            self._warn_of_strange(chosen)
            metrics = {}
            if self._user_metrics is not None and trainer.state.fn != "fit":
                keys = [key for key, each in counts.streams.items() if each is chosen]
                local = own.get(number, {}).get(keys[0])
                known = None if local is None else local.metrics
                metrics = (known or self._user_metrics.copy(trainer.strategy.root_device)).compute(group)
            size = chosen.tally.number_of_names
            names = names_of_classes(self._given_names(trainer, dataset, size), size) if size else ()
            read_as = chosen.reading.words(chosen.width, chosen.evidence)
            loader = number if len(summed) > 1 else None
            reports.append(chosen.tally.report(Context(stage, names, loader, read_as, metrics)))
            if not trainer.sanity_checking:
                warn_of_repeated_samples(trainer, counts.samples, dataset, repeated[number])
        return reports

    def _explain(self, counts: LoaderCounts, chosen: Stream | Question | None) -> None:
        """Warn of what was not counted."""
        start = f"{type(self).__name__} counts nothing: "
        if not counts.samples:
            return
        if isinstance(chosen, Question):
            self._warn(f"{start}{chosen.text}. {self._unread}.")
        elif counts.too_many_classes and not isinstance(chosen, Stream):
            self._warn(
                f"{start}there are {counts.too_many_classes:,} classes, and at most {MOST_CLASSES:,} are supported."
            )
        elif isinstance(chosen, Stream):
            self._warn(
                f"{start}no logits of classes were found. {self._unread}. These are {chosen.reading.words(chosen.width, chosen.evidence)}: "
                "ComparisonReport reports them."
            )
        else:
            for stream in counts.streams.values():
                self._warn_of_strange(stream)
            self._warn(
                f"{start}no logits of classes were found. {self._unread}. Expected logits of shape (batch, classes, ...) from "
                "forward, or outputs of the shape of the targets. If the targets are elsewhere, set target_key."
            )

    def _warn_of_strange(self, stream: Stream) -> None:
        if strange := sorted(stream.evidence.strange):
            numbers = some_of(map(str, strange))
            self._warn(
                f"{type(self).__name__} ignores targets outside 0..{max(stream.width, 2) - 1}: {numbers}. If these samples "
                "should be ignored, set ignore_index."
            )

    def _given_names(self, trainer: Trainer, dataset: Any, size: int) -> Any:
        given = self.class_names or getattr(getattr(trainer, "datamodule", None), "class_names", None)
        if given is None:
            found = getattr(dataset, "classes", None)
            given = found if isinstance(found, list | tuple) and len(found) == size else None
        return given

    def _number_of_classes(self, trainer: Trainer, pl_module: LightningModule, dataset: Any) -> int | None:
        holders = (self.class_names, getattr(getattr(trainer, "datamodule", None), "class_names", None))
        names = next((each for each in (*holders, getattr(dataset, "classes", None)) if each is not None), None)
        if isinstance(names, Sequence) and len(names):
            return len(names)
        given = pl_module.hparams.get("num_classes", getattr(pl_module, "num_classes", None))
        return given if isinstance(given, int) else None

    def _warn(self, message: str) -> None:
        start = message.partition(":")[0]
        if start not in self._warned:
            self._warned.add(start)
            rank_zero_warn(message)


def _holds_all_adapters(call: Call, calls: list[Call], pl_module: LightningModule) -> bool:
    """Return whether the inputs of the call are independent of adapters."""
    inside = {id(parameter) for parameter in call.module.parameters()}
    first = next(each for each in calls if each.module is call.module) is call
    return first and all(id(parameter) in inside for parameter in adapter_parameters(pl_module))


def _number(loaders: Any, number: int) -> Any:
    """Return the data loader of this number."""
    each = loaders if isinstance(loaders, list | tuple) else [loaders]
    return each[number] if number < len(each) else None


def _to_log_in_fit(report: Report) -> dict[str, float]:
    """Return the recall of each class or their mean, or the numbers of another task."""
    if not isinstance(report.adapted, Confusion):
        return {name: value for name, value in report.adapted.summary().items() if not isnan(value)}
    recalls = zip(report.adapted.class_names, report.adapted.recall, strict=True)
    known = {f"recall/{loggable(name)}": recall for name, recall in recalls if not isnan(recall)}
    return {"mean_recall": sum(known.values()) / len(known)} if len(known) > SHOWN_CLASSES else known
