"""Defines `Classifier`, the base `LightningModule`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import MeanMetric
from typing_extensions import override

from lora_lightning.checkpoints.checkpoints import ADAPTER_KEY, holds_adapters_alone
from lora_lightning.lora import is_adapted, lora_plus_param_groups
from lora_lightning.lora.lora_plus import check_lr_ratio
from lora_lightning.models.one_cycle import OneCycle

NO_TARGET = -100
"""Target of a sample that is not counted: the default `ignore_index` of PyTorch's losses."""


def adam(parameters: Iterable[nn.Parameter] | list[dict[str, Any]]) -> Optimizer:
    """Return the default optimizer of `Classifier`."""
    return torch.optim.Adam(parameters, lr=1e-3, fused=True)


class Classifier(LightningModule):
    """Trains a backbone with the cross-entropy loss.

    The steps return `{"loss", "logits", "targets"}`. The logged loss and accuracy of validation and test are means
    over the samples of all data loaders, without those whose target is -100.

    Args:
        backbone: A module that maps a batch of inputs to logits of shape (B, num_classes), or to an object with
            `logits`. Inputs that are a mapping, as from `TextDataModule`, are passed as keyword arguments.
        optimizer: A function from the trainable parameters to an optimizer. The default is Adam with PyTorch's fused
            kernel.
        lr_scheduler: A function from the optimizer to a learning-rate scheduler, which is stepped after every training
            step. `OneCycle` gets the length of the run.
        num_classes: Number of classes. If given, it is compared with that of the backbone and of the data.
        lr_ratio: Ratio of the learning rates of B and A (LoRA+, https://arxiv.org/abs/2402.12354, which recommends
            about 16). If it is not 1 and there are adapters, `optimizer` gets two parameter groups, and the learning
            rate of the second one, with B, is multiplied. A scheduler with learning rates of its own, such as
            `OneCycleLR(max_lr)`, then needs one for each group.

    Raises:
        ValueError: If `num_classes` or `lr_ratio` is out of range.

    Example::

        Classifier(RichBoyNet(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.Adam(parameters, lr=1e-3, fused=True),
        lr_scheduler: LRSchedulerCallable | None = None,
        num_classes: int | None = None,
        lr_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: expected at least 2.")
        self.backbone = backbone
        # jsonargparse reads the settings in the default, a lambda. A strategy that starts processes needs a function.
        self.optimizer = adam if optimizer is _DEFAULT_OPTIMIZER else optimizer
        self.lr_scheduler = lr_scheduler
        self.num_classes = num_classes
        self.lr_ratio = check_lr_ratio(lr_ratio)
        self._loss, self._accuracy = MeanMetric(), MeanMetric()

    @override
    def forward(self, inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
        output = self.backbone(**inputs) if isinstance(inputs, Mapping) else self.backbone(inputs)
        # Networks of the transformers library return an object with several fields.
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        logits, targets, loss = self._step(batch)
        if self._logs_this_step():
            logged = {"train/loss": loss.detach(), "train/accuracy": _fraction_correct(logits, targets)}
            self.log_dict(logged, prog_bar=True, batch_size=len(targets))
        return {"loss": loss, "logits": logits.detach(), "targets": targets}

    @override
    def on_validation_epoch_start(self) -> None:
        self._reset_means()

    @override
    def validation_step(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        return self._evaluate(batch)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_means("val")

    @override
    def on_test_epoch_start(self) -> None:
        self._reset_means()

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        return self._evaluate(batch)

    @override
    def on_test_epoch_end(self) -> None:
        self._log_means("test")

    @override
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the logits for a batch of inputs, or of inputs and targets."""
        logits: Tensor = self(batch[0] if isinstance(batch, tuple | list) else batch)
        return logits

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self._make_optimizer()
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, OneCycle):
            scheduler.spread_over(self._total_steps())
        if isinstance(scheduler, ReduceLROnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of adapters for a model without adapters, and explain how to use it."""
        description = checkpoint.get(ADAPTER_KEY)
        if description is not None and "adapter_state" not in description and not is_adapted(self):
            raise ValueError(holds_adapters_alone(description))

    def _make_optimizer(self) -> Optimizer:
        if self.lr_ratio != 1 and is_adapted(self):
            # Learning rates relative to that of the optimizer, which is known once it exists.
            groups = lora_plus_param_groups(self, lr=1.0, lr_ratio=self.lr_ratio)
            optimizer = self.optimizer([{"params": group["params"]} for group in groups])
            for made, group in zip(optimizer.param_groups, groups, strict=True):
                made["lr"] *= group["lr"]
            return optimizer
        if self.lr_ratio != 1:
            rank_zero_info(f"lr_ratio={self.lr_ratio:g} has no effect: the model has no adapters.")
        return self.optimizer(parameter for parameter in self.parameters() if parameter.requires_grad)

    def _total_steps(self) -> int:
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("OneCycle needs the length of the run: set max_epochs or max_steps of the Trainer.")
        return int(total)

    def _step(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        inputs, targets = batch
        logits = self(inputs)
        if self.num_classes not in (None, logits.shape[1]):
            raise ValueError(
                f"The backbone returns {logits.shape[1]} logits, but num_classes={self.num_classes}: "
                "set both to the same number."
            )
        return logits, targets, F.cross_entropy(logits, targets)

    def _evaluate(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        logits, targets, loss = self._step(batch)
        if counted := int((targets != NO_TARGET).sum()):  # the mean over no samples is NaN
            self._loss.update(loss.detach().float(), counted)
            self._accuracy.update(_fraction_correct(logits, targets), counted)
        return {"loss": loss, "logits": logits, "targets": targets}

    def _reset_means(self) -> None:
        for mean in (self._loss, self._accuracy):
            mean.reset()
            mean.update(0.0, 0.0)  # a device may get no batch

    def _log_means(self, stage: str) -> None:
        """Log the means over all samples of all devices, weighted by their number."""
        loss, accuracy = self._loss.compute(), self._accuracy.compute()
        if not accuracy.isnan():  # NaN if there are no samples
            means = {f"{stage}/loss": loss, f"{stage}/accuracy": accuracy}
            # All devices have the same value. The maximum of equal numbers is exact, while their mean is not.
            self.log_dict(means, prog_bar=True, sync_dist=True, reduce_fx="max")

    def _logs_this_step(self) -> bool:
        """Return whether a logger writes this step, or a callback may use its metrics at the end of the epoch.

        Logging takes about a millisecond, as long as a complete LoRA step on a small batch.
        """
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined] # Trainer sets it from elsewhere
        return self.trainer.is_last_batch or (every > 0 and (self.trainer.global_step + 1) % every == 0)


def _fraction_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the fraction of correct predictions among the samples with a target, which is -100 for others."""
    return (logits.detach().argmax(1) == targets).sum() / (targets != NO_TARGET).sum()


_DEFAULT_OPTIMIZER = signature(Classifier).parameters["optimizer"].default
