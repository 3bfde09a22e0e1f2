"""Implements `lora-lightning find-lr`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lora_lightning.find_lr import find_learning_rate
from lora_lightning.find_lr.sweep import RATES
from lora_lightning.models import Classifier
from lora_lightning.report.figure import write_png
from lora_lightning.report.files import free_path, refuse_to_overwrite, write_to
from lora_lightning.report.terminal import show


def find_lr(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    rates: tuple[float, ...] = RATES,
    steps: int | None = None,
    monitor: str | None = None,
    output: Path | None = None,
) -> Path:
    """Try several learning rates in short runs, and show which one to use.

    Args:
        trainer: The trainer of the training.
        model: The model of the training.
        datamodule: The data of the training.
        rates: Factors of the configured learning rates.
        steps: Number of steps for each rate. The default is a tenth of those of `fit`, but at least 50, or all of them
            if there are fewer.
        monitor: Name of a logged validation metric, lower is better. By default the validation loss.
        output: The figure to write. By default `learning_rates.png`, or the first unused one of
            `learning_rates-v1.png`, ....

    Returns:
        The path of the figure.

    Raises:
        ValueError: For the reasons of `find_learning_rate`.
        FileExistsError: If the figure already exists.
    """
    output = free_path(Path("learning_rates.png")) if output is None else Path(output)
    refuse_to_overwrite(output)
    show(f"Trying the configured learning rate times {', '.join(f'{rate:g}' for rate in sorted(set(rates)))} ...")
    found = find_learning_rate(trainer, model, datamodule, rates, steps, monitor)
    show(found.table())
    show(found.answer(), highlight=False, soft_wrap=True)
    for warning in found.warnings:
        show(warning, highlight=False, soft_wrap=True)
    write_to(str(output), partial(write_png, found.figure()))
    lines = {"figure": str(output)}
    if isinstance(model, Classifier) and not found.best.diverged:
        lines["option"] = f"--model.optimizer.lr {found.rate:.3g}"
    for name, value in lines.items():
        show(f"{name}: {value}", highlight=False, markup=False, soft_wrap=True)
    return output
