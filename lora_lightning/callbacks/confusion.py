"""`ConfusionReport`: per-class counts of a model, and of its base beside it."""

from __future__ import annotations

from collections.abc import Iterable
from math import isnan
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from rich import get_console
from torchmetrics.classification import MulticlassConfusionMatrix
from typing_extensions import override

from lora_lightning.lora import disabled, is_adapted
from lora_lightning.report import SHOWN_CLASSES, Confusion, Report, confusion_figures, report_table, write_report


class ConfusionReport(Callback):
    """Counts, class by class, what a model takes for what; with adapters attached, its base beside it.

    In `test` and `validate` one pass over the data gives a table in the terminal, confusion figures and per-class
    recall and precision in TensorBoard, and `confusion.json` and `confusion.csv` in the run's log folder. During `fit`,
    each validation logs the recall of every class as `val/recall/<class>`, or of more than 20 their mean as
    `val/mean_recall`. Of more than 20 classes the table, the figures and the scalars have the 20 of lowest recall. Counts
    are exact, on any number of devices.

    The module's `test_step` and `validation_step` have to return a dictionary with `"logits"` (B, C) and `"targets"`
    (B,), as those of `Classifier` do. The base's logits come from calling the module, adapters disabled, on the first
    element of the batch.

    Args:
        class_names: Names of the C classes; by default the data module's `class_names`, or else their numbers.

    Attributes:
        report: The latest `Report` of `test` or `validate`, on every device; `None` before.
    """

    def __init__(self, class_names: list[str] | None = None, verbose: bool = True) -> None:
        self.class_names = class_names
        self.verbose = verbose
        self.report: Report | None = None
        self._model_counts: MulticlassConfusionMatrix | None = None
        self._base_counts: MulticlassConfusionMatrix | None = None

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._model_counts = self._base_counts = None

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._model_counts = self._base_counts = None

    @override
    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        self._count(trainer, pl_module, outputs, batch)

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        if not trainer.sanity_checking:
            self._count(trainer, pl_module, outputs, batch)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, "test", trainer.test_dataloaders)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._finish(trainer, "val", trainer.val_dataloaders)
        elif self._model_counts is not None:
            confusion = self._confusion(trainer, self._model_counts)
            recalls = zip(confusion.class_names, confusion.recall, strict=True)
            known = {f"val/recall/{name}": recall for name, recall in recalls if not isnan(recall)}
            if len(known) > SHOWN_CLASSES:
                known = {"val/mean_recall": sum(known.values()) / len(known)}
            pl_module.log_dict(known, sync_dist=True)

    def _count(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if not isinstance(outputs, dict) or "logits" not in outputs or "targets" not in outputs:
            found = sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__
            raise ValueError(
                f"ConfusionReport got {found} from {type(pl_module).__name__}'s step; expected a dictionary with "
                "'logits' of shape (batch, classes) and 'targets' of shape (batch,). Return them from test_step and "
                "validation_step."
            )
        logits, targets = outputs["logits"], outputs["targets"]
        if self._model_counts is None:
            self._model_counts = _counter(logits.shape[1], logits.device)
        self._model_counts.update(logits.argmax(1), targets)
        if trainer.state.fn == "fit" or not is_adapted(pl_module):
            return
        if not isinstance(batch, tuple | list):
            raise ValueError(
                f"ConfusionReport compares with the base by calling the module on a batch's first element, but the "
                f"batch is a {type(batch).__name__}; expected a tuple of inputs and targets."
            )
        if self._base_counts is None:
            self._base_counts = _counter(logits.shape[1], logits.device)
        with disabled(pl_module):
            self._base_counts.update(pl_module(batch[0]).argmax(1), targets)

    def _finish(self, trainer: Trainer, stage: str, loaders: Any) -> None:
        if self._model_counts is None:
            return
        model = self._confusion(trainer, self._model_counts)
        base = None if self._base_counts is None else self._confusion(trainer, self._base_counts)
        self.report = Report(stage, model, base)
        _warn_of_repeated_samples(trainer, model.total, loaders)
        log_dir = trainer.log_dir if trainer.loggers else None  # every device is asked for it
        if not trainer.is_global_zero:
            return
        if self.verbose:
            get_console().print(report_table(self.report))
        for logger in trainer.loggers:
            logger.log_metrics(_per_class_metrics(self.report), trainer.global_step)
            if isinstance(logger, TensorBoardLogger):
                for name, figure in confusion_figures(self.report).items():
                    logger.experiment.add_figure(f"{stage}/confusion/{name}", figure, trainer.global_step)
        fast_dev_run = trainer.fast_dev_run  # type: ignore[attr-defined] # Trainer sets it from elsewhere
        if log_dir is not None and not fast_dev_run:
            write_report(self.report, Path(log_dir))

    def _confusion(self, trainer: Trainer, counts: MulticlassConfusionMatrix) -> Confusion:
        """Of all devices: every one of them has to come here."""
        matrix = counts.compute().cpu()
        names: Iterable[str] | None = self.class_names
        if names is None:
            names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
        names = tuple(str(index) for index in range(len(matrix))) if names is None else tuple(names)
        if len(names) != len(matrix):
            raise ValueError(
                f"{len(names)} class names ({', '.join(names[:5])}, ...) for a model of {len(matrix)} classes. Give "
                "ConfusionReport one name a class with class_names."
            )
        return Confusion(matrix, names)


def _counter(num_classes: int, device: torch.device) -> MulticlassConfusionMatrix:
    """On the model's device, where a callback's metric would not be moved by itself."""
    return MulticlassConfusionMatrix(num_classes, validate_args=False).to(device)


def _per_class_metrics(report: Report) -> dict[str, float]:
    """`test/recall/9`, `test/precision/9` and, for the base, `test/base_recall/9`, ..., of the classes that are shown."""
    confusions = {"": report.model} if report.base is None else {"": report.model, "base_": report.base}
    return {
        f"{report.stage}/{prefix}{ratio}/{confusion.class_names[index]}": getattr(confusion, ratio)[index]
        for prefix, confusion in confusions.items()
        for ratio in ("recall", "precision")
        for index in report.model.shown()
        if not isnan(getattr(confusion, ratio)[index])
    }


def _warn_of_repeated_samples(trainer: Trainer, total: int, loaders: Any) -> None:
    """On several devices Lightning's default sampler repeats samples to give each device as many."""
    if trainer.world_size == 1 or trainer.limit_test_batches != 1.0 or trainer.limit_val_batches != 1.0:
        return
    size = len(getattr(loaders, "dataset", []))
    if size and total != size:
        rank_zero_warn(
            f"The confusion matrix counts {total:,} samples of a data set of {size:,}: the sampler repeats or leaves "
            "out some. Use lightning.pytorch.overrides.distributed.UnrepeatedDistributedSampler for exact counts."
        )
