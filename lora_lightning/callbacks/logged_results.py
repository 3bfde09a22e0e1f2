"""Logs results in the form that each logger supports."""

from __future__ import annotations

import os
from math import isnan
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lora_lightning.callbacks.lora_finetuning import LoRAFinetuning
from lora_lightning.evaluation import Confusion, Report
from lora_lightning.lightning_packages import is_a
from lora_lightning.lora import backbone_of, is_adapted
from lora_lightning.lora.adaptation import config_of
from lora_lightning.report.loggers import log_figure

if TYPE_CHECKING:  # matplotlib takes half a second to import
    from matplotlib.figure import Figure

_FIGURES = {name: name for name in ("model", "base", "adapted", "difference")} | {"mistakes": "changed_samples"}
"""Figures to log, by name."""
_SETTINGS = ("rank", "alpha", "dropout", "target_modules", "init", "use_rslora", "use_dora")


def log_report(trainer: Trainer, pl_module: LightningModule, report: Report, figures: dict[str, Figure]) -> None:
    """Log a report.

    Loggers that support them get figures, TensorBoard the settings with the errors, and others the numbers per class.
    TensorBoard gets the numbers per class as a single figure, since each scalar would be a chart with one point.
    `figures` is the result of `report_figures`.
    """
    for logger in trainer.loggers:
        names = _FIGURES
        if is_a(logger, TensorBoardLogger):
            names = names | {"classes": "classes"}
            logger.log_hyperparams(settings(trainer, pl_module), _outcome(report))
        else:
            logger.log_metrics(report.metrics_to_log(), trainer.global_step)
        for name, logged in names.items():
            if name in figures:
                tag = f"{report.stage}/confusion/{logged}{report.suffix}"
                log_figure(logger, tag, figures[name], trainer.global_step)


def show_classes_as_one_chart(trainer: Trainer) -> None:
    """Let TensorBoard draw the recall of all classes after each validation in one chart, under custom scalars."""
    for logger in trainer.loggers:
        if is_a(logger, TensorBoardLogger) and trainer.is_global_zero:
            experiment: Any = logger.experiment
            experiment.add_custom_scalars({"validation": {"recall by class": ["Multiline", ["val/recall/.*"]]}})


def log_settings(trainer: Trainer, pl_module: LightningModule) -> None:
    """Log the settings of a run as hyper-parameters."""
    for logger in trainer.loggers:
        if is_a(logger, TensorBoardLogger):
            logger.log_hyperparams(settings(trainer, pl_module), {})  # otherwise Lightning logs a metric of -1
        else:
            logger.log_hyperparams(settings(trainer, pl_module))


def settings(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Return the settings of a run: those of the adapters, the classes in focus, and the seed."""
    found: dict[str, Any] = {"seed": os.environ.get("PL_GLOBAL_SEED")}
    callbacks = trainer.callbacks  # type: ignore[attr-defined] # Trainer sets it from elsewhere
    configs = [each.config for each in callbacks if isinstance(each, LoRAFinetuning)]
    if is_adapted(pl_module):
        configs = [config_of(backbone_of(pl_module))]  # which may come from an adapter folder
    for config in configs:
        found |= {name: getattr(config, name) for name in _SETTINGS}
    focus = getattr(getattr(trainer, "datamodule", None), "focus", None)
    return {
        name: str(value) if isinstance(value, list) else value for name, value in (found | {"focus": focus}).items()
    }


def _outcome(report: Report) -> dict[str, float]:
    if not isinstance(report.adapted, Confusion):
        return {f"hp/{name}": value for name, value in report.adapted.summary().items() if not isnan(value)}
    errors = {"": report.adapted, "base_": report.base}
    found: dict[str, float] = {f"hp/{key}errors": sum(each.errors) for key, each in errors.items() if each}
    return found | ({"hp/accuracy": report.adapted.accuracy} if report.adapted.total else {})
