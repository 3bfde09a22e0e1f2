"""Logs results in the form that each logger supports."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from math import isnan
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lora_lightning.callbacks.lora_finetuning import LoRAFinetuning
from lora_lightning.evaluation import Confusion, Report
from lora_lightning.lightning_packages import is_a
from lora_lightning.lora import backbone_of, is_adapted
from lora_lightning.lora.record import config_of
from lora_lightning.report.loggers import log_figures

if TYPE_CHECKING:  # matplotlib takes half a second to import
    from matplotlib.figure import Figure

_SETTINGS = ("rank", "alpha", "dropout", "target_modules", "init", "use_rslora", "use_dora")
_OURS = "updates"
"""Group of what we log beside the user's metrics. It is shown after `train/`."""
_OUTCOME = "verdict"
"""Group of the final errors, which is shown after `val/`."""


def log_scalar(trainer: Trainer, name: str, value: float) -> None:
    """Log a number of ours. TensorBoard, which sorts by name, shows it after the metrics of the user."""
    for logger in trainer.loggers:
        tag = f"{_OURS}/{name}" if is_a(logger, TensorBoardLogger) else name
        logger.log_metrics({tag: value}, trainer.global_step)


def log_report(
    trainer: Trainer,
    pl_module: LightningModule,
    report: Report,
    figures: dict[str, Figure],
    further: Mapping[str, object],
) -> None:
    """Log a report.

    Loggers that support them get figures, TensorBoard the settings with the errors, and others the numbers per class.
    TensorBoard gets the numbers per class as a single figure, since each scalar would be a chart with one point.
    `figures` is the result of `report_figures`, and `further` are further settings.
    """
    for logger in trainer.loggers:
        if is_a(logger, TensorBoardLogger):
            found = settings(trainer, pl_module) | dict(further)
            logger.log_hyperparams(found, _outcome(report), trainer.global_step)
        else:
            logger.log_metrics(report.metrics_to_log(), trainer.global_step)
    if isinstance(report.adapted, Confusion):
        log_figures(trainer.loggers, report, figures, trainer.global_step)


def log_outcome_of_fit(trainer: Trainer, pl_module: LightningModule, report: Report | None) -> None:
    """Log the settings with the errors of the last validation, if there was one, for TensorBoard's table of runs."""
    for logger in trainer.loggers:
        if report is not None and is_a(logger, TensorBoardLogger):
            found = {tag.replace("/", "/val_"): value for tag, value in _outcome(report).items()}
            logger.log_hyperparams(settings(trainer, pl_module), found, trainer.global_step)


def show_charts(trainer: Trainer) -> None:
    """Let TensorBoard draw training and validation of a metric in one chart, and all recalls in another."""
    charts = charts_of(map(str, trainer.callback_metrics))
    for logger in trainer.loggers:
        if charts and is_a(logger, TensorBoardLogger) and trainer.is_global_zero:
            experiment: Any = logger.experiment
            experiment.add_custom_scalars({"training and validation": charts})


def charts_of(names: Iterable[str]) -> dict[str, list[Any]]:
    """Return a chart for each metric of training or validation: the loss first, and the recalls of all classes as one.

    The chart of a metric is the same for all runs, so that TensorBoard draws several runs in one.

    Args:
        names: Names of metrics, such as `train/loss` and `val_loss`.
    """
    found = (re.fullmatch(r"(?:train|val)[/_](.+)", name) for name in names)
    metrics = {each[1] for each in found if each is not None and not each[1].endswith(("_step", "_epoch"))}
    charts = {metric: f"^(train|val)[/_]{re.escape(metric)}$" for metric in metrics if not metric.startswith("recall/")}
    if len(charts) < len(metrics):
        charts["recall by class"] = "^val/recall/"
    order = sorted(charts, key=lambda metric: (metric != "loss", "recall" not in metric, metric))
    return {metric: ["Multiline", [charts[metric]]] for metric in order}


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
        found["alpha"] = config.rank if config.alpha is None else config.alpha
    focus = getattr(getattr(trainer, "datamodule", None), "focus", None)
    return {
        name: str(value) if isinstance(value, list) else value for name, value in (found | {"focus": focus}).items()
    }


def _outcome(report: Report) -> dict[str, float]:
    if not isinstance(report.adapted, Confusion):
        return {f"{_OUTCOME}/{name}": value for name, value in report.adapted.summary().items() if not isnan(value)}
    errors = {"": report.adapted, "base_": report.base}
    return {f"{_OUTCOME}/{key}errors": sum(each.errors) for key, each in errors.items() if each}
