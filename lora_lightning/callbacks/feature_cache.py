"""Defines `FeatureCache`, which stores the output of the frozen part of a network."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lora_lightning.feature_cache.cache import PrefixCache
from lora_lightning.lora import backbone_of


class FeatureCache(Callback):
    """Stores the features that the frozen part of a network computes for each training sample before the first trained layer.

    From the second epoch on, training skips this part. Adapters in the last layers train many times faster, and the result is bitwise the
    same. Validation computes the complete network. The features need memory on the device of the model, and a log line after the first
    batch says how much. Use this callback with `LoRAFinetuning` or with other frozen layers.

    If nothing can be stored, a warning says why, and training computes everything: there has to be a frozen and deterministic part before
    the first trained layer, whose features do not depend on the other samples in a batch, and inputs may not change by augmentation.

    Example::

        callbacks = [LoRAFinetuning(target_modules=["classifier.3", "classifier.6"]), FeatureCache()]
    """

    def __init__(self) -> None:
        self.cache: PrefixCache | None = None
        self._said = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if getattr(data, "augmentation", None):
            rank_zero_warn(
                f"FeatureCache stores nothing: the augmentation of {type(data).__name__} changes the inputs in each epoch. "
                "Remove one of the two."
            )
            return
        dataset: Any = getattr(trainer.train_dataloader, "dataset", None)
        self.cache = PrefixCache(backbone_of(pl_module), len(dataset) if hasattr(dataset, "__len__") else None)
        self._said = False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.cache is not None:
            self.cache.active = True

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self.cache is None:
            return
        self.cache.active = False
        if not self._said and self.cache.prefix:
            self._said = True
            names = ", ".join(repr(step.name) for step in self.cache.prefix.kept)
            rank_zero_info(
                f"Frozen prefix: the output of {names} is computed once per sample and stored ({self.cache.bytes_per_sample:,} bytes per "
                f"sample). The prefix ends before {self.cache.prefix.ended_by}."
            )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        if self.cache is not None:
            self.cache.remove()
            self.cache = None
