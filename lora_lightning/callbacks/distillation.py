"""Distils the frozen base into the adapted model during training. The teacher is the model with disabled adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lora_lightning.callbacks.recorded_calls import Call, RecordedCalls
from lora_lightning.lora import disabled
from lora_lightning.report.found import tensors_of


class Distillation:
    """Adds the gradient of `weight * T² KL(base || model)` to the gradient of the training loss at the logits.

    KL is the divergence between the softmax of z₀ / T of the base and that of z / T of the model, averaged over samples (Hinton, Vinyals,
    Dean 2015, https://arxiv.org/abs/1503.02531, section 2). The gradient of T² KL with respect to z is
    T (softmax(z / T) - softmax(z₀ / T)) / N. It is added when the gradient of the loss reaches the logits, so there is a single backward
    pass in any strategy and precision.

    The logits are the output of `forward` of the module in the step, or of one of its children: a tensor of shape (N, C), (N, C, H, W), or
    (N, L, C), or an object with such a tensor.

    Args:
        weight: Weight of the term.
        temperature: Temperature T.

    Raises:
        ValueError: If a value is out of its range.
    """

    def __init__(self, weight: float, temperature: float) -> None:
        if not 0 < weight < float("inf"):
            raise ValueError(f"distillation={weight}: expected a finite weight above 0, or 0 for none.")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature={temperature}: expected a finite number above 0.")
        self.weight, self.temperature = weight, temperature
        self._recorded: RecordedCalls | None = None
        self._warned = False

    def record(self, pl_module: LightningModule) -> None:
        """Record the calls of the next step."""
        self.stop()
        self._recorded = RecordedCalls(pl_module)

    def stop(self) -> list[Call]:
        """Restore the module and return the recorded calls."""
        recorded, self._recorded = self._recorded, None
        return recorded.stop() if recorded else []

    def add_gradient(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the gradient in the next backward pass."""
        calls = self.stop()
        own = [call for call in calls if call.module is pl_module]
        found = next(((call, each) for call in own or reversed(calls) for each in _with_gradient(call.output)), None)
        if found is None:
            if not self._warned:
                self._warned = True
                rank_zero_warn(
                    f"distillation={self.weight} has no effect: the step of {type(pl_module).__name__} called no module that "
                    "returned logits of classes with a gradient. Expected logits of shape (batch, classes, ...) from forward."
                )
            return
        call, logits = found
        classes = -1 if logits.dim() == 3 else 1
        difference = self._softmax(logits.detach(), classes) - self._softmax(
            self._of_base(trainer, pl_module, call), classes
        )
        samples = logits.numel() // logits.shape[classes]
        scale = self.weight * self.temperature * _scale_of_loss(trainer, pl_module) / samples
        gradient = (difference * scale).to(logits.dtype)
        logits.register_hook(lambda arrived: arrived + gradient)  # type: ignore[no-untyped-call]

    def _softmax(self, logits: Tensor, classes: int) -> Tensor:
        return (logits.float() / self.temperature).softmax(classes)

    def _of_base(self, trainer: Trainer, pl_module: LightningModule, call: Call) -> Tensor:
        """Return the logits of the base for the same call, without dropout and without changing norm statistics."""
        modes = {module: module.training for module in call.module.modules()}
        call.module.eval()
        try:
            with torch.no_grad(), disabled(pl_module), trainer.precision_plugin.forward_context():
                return next(_class_logits(call.module(*call.args, **call.kwargs)))
        finally:
            for module, mode in modes.items():
                module.training = mode


def _with_gradient(output: Any) -> Iterator[Tensor]:
    return (each for each in _class_logits(output) if each.requires_grad)


def _class_logits(output: Any) -> Iterator[Tensor]:
    return (each for each in tensors_of(output) if each.is_floating_point() and each.dim() > 1 and each.shape[1] > 1)


def _scale_of_loss(trainer: Trainer, pl_module: LightningModule) -> float:
    """Return the factor of the loss before the backward pass, from gradient accumulation and a gradient scaler."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = 1.0 if scaler is None else float(scaler.get_scale())
    return scale / trainer.accumulate_grad_batches if pl_module.automatic_optimization else scale
