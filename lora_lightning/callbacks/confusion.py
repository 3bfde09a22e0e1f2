"""Defines `ConfusionReport`, which reports the confusion matrix of a model and its base."""

from __future__ import annotations

from math import isnan
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lora_lightning.callbacks.evaluation import data_parallel_group, decoder, names_of_classes, warn_of_repeated_samples
from lora_lightning.callbacks.logged_results import log_report, log_settings, show_classes_as_one_chart
from lora_lightning.callbacks.recorded_calls import Call, RecordedCalls
from lora_lightning.callbacks.run_files import RecordedMetrics, log_folder, write_facts
from lora_lightning.lora import adapter_parameters, disabled, is_adapted
from lora_lightning.report import Confusion, Report, report_table
from lora_lightning.report.changes import Changes, Inputs, pairs_of_devices
from lora_lightning.report.confusion import SHOWN_CLASSES, loggable
from lora_lightning.report.counts import Counts, sum_over_devices
from lora_lightning.report.figure import report_figures
from lora_lightning.report.files import write_report
from lora_lightning.report.found import align, counted, described, find_targets
from lora_lightning.report.terminal import show
from lora_lightning.wording import some_of

_MOST_CLASSES = 4096


class ConfusionReport(Callback):
    """Reports the confusion matrix of a model. If the model has adapters, it also reports that of the base.

    In `test` and `validate`, one pass over the data produces a table in the terminal, figures in the loggers, and files in the log
    folder of the run: `confusion.json`, `confusion.csv`, images of the matrices, the samples that changed, and `report.html`. Loggers other
    than TensorBoard receive the recall and precision of each class as numbers. During `fit`, each validation logs the recall of every class
    as `val/recall/<class>`, or for more than 20 classes their mean as `val/mean_recall`. `metrics.csv`, `curves.png` and the report are
    written at the end. For more than 20 classes, the table, the figures and the scalars contain the 20 with the lowest recall. Counts are
    exact on any number of devices. Each data loader has its own report.

    The module does not need to return or log anything. The logits are the output of `forward` of the module in the step, or of one of its
    children: a tensor, or an object, mapping or tuple with a tensor. The logits of the base come from the same call with the adapters
    disabled, and the step runs once. The targets are the second element of the batch, or its entry `labels`, `label`, `targets`,
    `target`, `y` or `mask`. Logits of shape (B, C, ...), for example for pixels, are counted individually. A single logit per sample means
    two classes. A warning says what could not be found.

    Args:
        class_names: Names of the C classes. The default is `class_names` of the data module, `classes` of the data set, or numbers.
        verbose: Whether to print the table.
        target_key: Key or position of the targets in a batch, if it differs from the above.
        ignore_index: Target to ignore in addition to -100. The default is the hyper-parameter of this name of the module, if any.

    Attributes:
        reports: The latest `Report` of each data loader in `test` or `validate`, on every device.
        report: The first of these reports, or `None` before.
    """

    def __init__(
        self,
        class_names: list[str] | None = None,
        verbose: bool = True,
        target_key: str | int | None = None,
        ignore_index: int | None = None,
    ) -> None:
        self.class_names = class_names
        self.verbose = verbose
        self.target_key = target_key
        self.ignore_index = ignore_index
        self.reports: list[Report] = []
        self._counts: dict[tuple[int, bool], Counts] = {}
        """Counts by the number of the loader and whether they are those of the base."""
        self._changes: dict[int, Changes] = {}
        self._recorded: RecordedCalls | None = None
        self._metrics = RecordedMetrics()
        self._warned: set[str] = set()

    @property
    def report(self) -> Report | None:
        """Return the latest report of the first data loader."""
        return self.reports[0] if self.reports else None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        log_settings(trainer, pl_module)

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counts, self._changes = {}, {}

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counts, self._changes = {}, {}

    @override
    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self._record(pl_module)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self._record(pl_module)

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
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "validate":
            self._finish(trainer, pl_module, "val", trainer.val_dataloaders)
            return
        for report in self._gathered(trainer, "val", trainer.val_dataloaders):
            recalls = zip(report.model.class_names, report.model.recall, strict=True)
            known = {f"recall/{loggable(name)}": recall for name, recall in recalls if not isnan(recall)}
            if len(known) > SHOWN_CLASSES:
                known = {"mean_recall": sum(known.values()) / len(known)}
            found = {f"val/{name}{report.suffix}": value for name, value in known.items()}
            pl_module.log_dict(found, sync_dist=True, add_dataloader_idx=False)  # the suffix names the loader

    def _record(self, pl_module: LightningModule) -> None:
        self._stop_recording()
        self._recorded = RecordedCalls(pl_module)

    def _stop_recording(self) -> list[Call]:
        recorded, self._recorded = self._recorded, None
        return recorded.stop() if recorded else []

    def _count(self, trainer: Trainer, pl_module: LightningModule, batch: Any, loader: int) -> None:
        calls = self._stop_recording()
        if (found := self._find(pl_module, calls, batch)) is None:
            return
        call, logits, targets, samples = found
        ignored = self.ignore_index
        if ignored is None and isinstance(named := pl_module.hparams.get("ignore_index"), int):
            ignored = named
        num_classes = logits.shape[1] if logits.dim() > 1 else 2
        valid, strange = counted(targets, num_classes, ignored)
        if len(strange):
            numbers = some_of(map(str, sorted(set(strange.tolist()))))
            self._warn(
                f"ConfusionReport ignores targets outside 0..{num_classes - 1}: {numbers}. If these samples "
                "should be ignored, set ignore_index."
            )
        if trainer.sanity_checking:
            return
        self._update(trainer, loader, False, logits[valid], targets[valid], samples)
        if trainer.state.fn == "fit" or not is_adapted(pl_module):
            return
        if call.module is not pl_module and not _holds_all_adapters(call, calls, pl_module):
            self._warn(
                f"ConfusionReport cannot report the base: the step of {type(pl_module).__name__} calls several "
                "of its modules, and the input of one depends on the adapters of another. Call them in forward, and self(...) in the step."
            )
            return
        with disabled(pl_module), trainer.precision_plugin.forward_context():
            base = align(call.module(*call.args, **call.kwargs), find_targets(batch, self.target_key))
        assert base is not None
        self._update(trainer, loader, True, base[0][valid], targets[valid], samples)
        inputs = Inputs(batch, valid.nonzero()[:, 0], decoder(trainer)) if len(targets) == samples else None
        changes = self._changes.setdefault(loader, Changes())
        changes.update(logits[valid], base[0][valid], targets[valid], inputs)

    def _find(
        self, pl_module: LightningModule, calls: list[Call], batch: Any
    ) -> tuple[Call, Tensor, Tensor, int] | None:
        """Return the call with the logits, the logits, the targets and the number of samples, or warn if there are none."""
        targets = find_targets(batch, self.target_key)
        if targets is None:
            what = f" under {self.target_key!r}" if self.target_key is not None else ""
            self._warn(
                f"ConfusionReport counts nothing: no targets{what} were found in the batch, which is {described(batch)}. Set "
                "target_key to the key or position of the targets."
            )
            return None
        own = [call for call in calls if call.module is pl_module]
        for call in own or reversed(calls):
            if (found := align(call.output, targets)) is None:
                continue
            logits, classes = found
            if logits.dim() > 1 and logits.shape[1] > _MOST_CLASSES:
                self._warn(
                    f"ConfusionReport counts nothing: there are {logits.shape[1]:,} classes, and at most {_MOST_CLASSES:,} are supported."
                )
                return None
            return call, logits.detach(), classes, len(targets)
        returned = ", ".join(described(call.output) for call in own or calls) or "nothing, as it was not called"
        self._warn(
            f"ConfusionReport counts nothing: no logits of classes were found. The targets are {described(targets)} of "
            f"{targets.dtype}; {'forward' if own or not calls else 'what the step called'} of {type(pl_module).__name__} returned "
            f"{returned}. Expected logits of shape (batch, classes, ...) from forward."
        )
        return None

    def _update(
        self, trainer: Trainer, loader: int, is_base: bool, logits: Tensor, targets: Tensor, samples: int
    ) -> None:
        key = loader, is_base
        if key not in self._counts:
            outputs = logits.shape[1] if logits.dim() > 1 else 1
            self._counts[key] = Counts(outputs, logits.device, data_parallel_group(trainer))
        self._counts[key].update(logits, targets)
        self._counts[key].samples += samples

    def _finish(self, trainer: Trainer, pl_module: LightningModule, stage: str, loaders: Any) -> None:
        self.reports = self._gathered(trainer, stage, loaders)
        folder = log_folder(trainer)
        if not trainer.is_global_zero:
            return
        for report in self.reports:
            figures = {} if folder is None and not trainer.loggers else report_figures(report)
            if folder is not None:
                write_report(report, folder, figures)
            if self.verbose:
                show(report_table(report, report.suffix.strip("/") or None))
            log_report(trainer, pl_module, report, figures)
        if folder is not None and self.reports:
            write_facts(trainer, pl_module, folder)

    def _gathered(self, trainer: Trainer, stage: str, loaders: Any) -> list[Report]:
        """Return the reports over all devices. Every device has to call this, even without samples."""
        found = sum_over_devices(self._counts, trainer.strategy.root_device, data_parallel_group(trainer))
        pairs = pairs_of_devices(self._changes, data_parallel_group(trainer))
        numbers = sorted({loader for loader, _ in found})
        each_loader = loaders if isinstance(loaders, list | tuple) else [loaders]
        reports = []
        for number in numbers:
            dataset = getattr(each_loader[number] if number < len(each_loader) else None, "dataset", None)
            matrix, samples = found[number, False]
            model = self._named(trainer, matrix, dataset)
            base, _ = found.get((number, True), (None, 0))
            before = None if base is None else Confusion(base, model.class_names)
            loader = number if len(numbers) > 1 else None
            reports.append(Report(stage, model, before, loader, pairs.get(number)))
            warn_of_repeated_samples(trainer, samples, dataset)
        return reports

    def _named(self, trainer: Trainer, matrix: Tensor, dataset: Any) -> Confusion:
        given = self.class_names or getattr(getattr(trainer, "datamodule", None), "class_names", None)
        if given is None:
            found = getattr(dataset, "classes", None)
            given = found if isinstance(found, list | tuple) and len(found) == len(matrix) else None
        return Confusion(matrix, names_of_classes(given, len(matrix)))

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
