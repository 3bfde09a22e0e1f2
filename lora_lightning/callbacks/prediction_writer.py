"""Defines `PredictionWriter`, which prints and saves predictions."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lora_lightning.evaluation import described, names_of_classes, tensors_of
from lora_lightning.report.files import free_name, write_to
from lora_lightning.report.terminal import show
from lora_lightning.wording import one_line

_LONGEST_LABEL, _LONGEST_NAME = 200, 60
_MOST_LINES = 10
"""Number of samples to print, if a file has the others."""


@dataclass(frozen=True)
class _Prediction:
    loader: int
    sample: int
    classes: list[int]
    probabilities: list[float]


class PredictionWriter(BasePredictionWriter):
    """Prints the most likely classes of each sample and writes `predictions.csv` to the log folder of the run.

    The file contains each sample of all devices once, in the order of the data set. The first ten are printed, or all
    if there is no log folder. `predict_step` of the module must
    return logits or probabilities of shape (B, C): a tensor, or an object, mapping or tuple with a tensor. The names of
    files and classes come from `predict_files` and `class_names` of the data module. Without these, they are numbers.
    With several data loaders, a sample is called `<loader>/<sample>`.

    Args:
        top_k: Number of classes per sample, in order of decreasing probability.

    Raises:
        ValueError: If `top_k` is below 1.
    """

    def __init__(self, top_k: int = 5) -> None:
        super().__init__("batch")
        if top_k < 1:
            raise ValueError(f"top_k={top_k!r}: expected at least 1.")
        self.top_k = top_k
        self._predictions: list[_Prediction] = []
        self._num_classes = 0

    @override
    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._predictions = []

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        logits = next((each for each in tensors_of(prediction) if each.is_floating_point() and each.dim() == 2), None)
        if logits is None:
            rank_zero_warn(
                f"The predictions are not saved: predict_step of {type(pl_module).__name__} returns "
                f"{described(prediction)}; expected logits of shape (batch, classes)."
            )
            return
        samples = list(batch_indices or _sampled(trainer, batch_idx, dataloader_idx))
        if len(samples) != len(logits):  # the samples of an iterable data set have no indices
            seen = sum(each.loader == dataloader_idx for each in self._predictions)
            first = trainer.global_rank + trainer.world_size * seen
            samples = list(range(first, first + trainer.world_size * len(logits), trainer.world_size))
        self._num_classes = logits.shape[1]
        top = _probabilities(logits.detach()).topk(min(self.top_k, self._num_classes))
        self._predictions += [
            _Prediction(dataloader_idx, *each)
            for each in zip(samples, top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            of_devices: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(of_devices, self._predictions)
            self._predictions = [each for of_device in of_devices for each in of_device]
        self._predictions.sort(key=lambda each: (each.loader, each.sample))

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the predictions so far."""
        if trainer.predicting and trainer.world_size == 1:
            self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        log_dir = trainer.log_dir if trainer.loggers else None  # all devices have to call log_dir
        if not trainer.is_global_zero or not self._predictions:
            return
        data = getattr(trainer, "datamodule", None)
        files = getattr(data, "predict_files", None)
        names = names_of_classes(getattr(data, "class_names", None), self._num_classes)
        several = len({each.loader for each in self._predictions}) > 1
        labels = [
            f"{each.loader}/{each.sample}" if several else str(files[each.sample] if files else each.sample)
            for each in self._predictions
        ]
        folder = os.path.commonpath([str(Path(label).parent) for label in labels]) if files and not several else "."
        rows = [[names[i] for i in each.classes] for each in self._predictions]
        shown = [one_line(os.path.relpath(label, folder), _LONGEST_LABEL) for label in labels]
        width = max(map(len, shown))
        path = None
        if log_dir is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined] # Trainer sets it from elsewhere
            path = free_name(log_dir, "predictions.csv")
            write_to(path, lambda local: _write(local, labels, self._predictions, rows))
        printed = len(shown) if path is None or len(shown) <= _MOST_LINES + 1 else _MOST_LINES
        for label, each, classes in zip(shown[:printed], self._predictions[:printed], rows[:printed], strict=True):
            ranked = [
                f"{one_line(name, _LONGEST_NAME)} {100 * p:.1f} %"
                for name, p in zip(classes, each.probabilities, strict=True)
            ]
            more = f"  ({', '.join(ranked[1:])})" if len(ranked) > 1 else ""
            line = f"{label:<{width}}  {ranked[0]}{more}"
            show(line, markup=False, highlight=False, soft_wrap=True)
        if printed < len(shown):
            show(f"and {len(shown) - printed:,} more", highlight=False)
        if path is not None:
            show(f"PredictionWriter: {path}", markup=False, highlight=False, soft_wrap=True)


def _sampled(trainer: Trainer, batch_idx: int, loader: int) -> Sequence[int]:
    """Return the numbers of the samples in a batch, which `pytorch_lightning` only passes to its own writers."""
    loaders = trainer.predict_dataloaders
    batch_sampler = getattr(loaders[loader] if isinstance(loaders, list | tuple) else loaders, "batch_sampler", None)
    batches: list[list[int]] = getattr(batch_sampler, "seen_batch_indices", [])
    return batches[batch_idx] if batch_idx < len(batches) else []


def _probabilities(output: Tensor) -> Tensor:
    """Return the output if it contains probabilities, else its softmax, which also converts log-probabilities."""
    values = output.float()
    tolerance = min(32 * torch.finfo(output.dtype).eps, 0.02)
    if bool((values >= 0).all()) and bool(((values.sum(1) - 1).abs() <= tolerance).all()):
        return values
    return values.softmax(1)


def _write(path: Path, labels: list[str], predictions: list[_Prediction], rows: list[list[str]]) -> None:
    ranks = range(2, len(rows[0]) + 1)
    header = [
        "file",
        "class",
        "category",
        "probability",
        *(f"{q}_{k}" for k in ranks for q in ("category", "probability")),
    ]
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for label, each, names in zip(labels, predictions, rows, strict=True):
            pairs = list(zip(names, each.probabilities, strict=True))
            writer.writerow([label, each.classes[0], *(value for pair in pairs for value in pair)])
