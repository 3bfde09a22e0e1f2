"""Logs figures to loggers that support them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lora_lightning.evaluation import Confusion, Report
from lora_lightning.report.figure import classes_figure, confusion_figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMES = {name: name for name in ("model", "base", "adapted", "difference")} | {"mistakes": "changed_samples"}
"""Names of the figures to log, and as which."""


def log_figures(loggers: Iterable[Any], report: Report[Confusion], written: dict[str, Figure], step: int) -> None:
    """Log the figures of a report with the loggers that support them.

    TensorBoard also gets the recalls of all classes as a figure, since each scalar would be a chart with one point.

    Args:
        loggers: The loggers.
        report: The report.
        written: The result of `report_figures`.
        step: The number of the training step.
    """
    takers = [logger for logger in loggers if _takes_figures(logger)]
    if not takers:
        return
    figures = confusion_figures(report) | {"classes": classes_figure(report)} | written
    for logger in takers:
        names = _NAMES | ({"classes": "classes"} if _is_tensorboard(logger) else {})
        for name, logged in names.items():
            if name in figures:
                _log_figure(logger, f"{report.stage}/confusion/{logged}{report.suffix}", figures[name], step)


def _takes_figures(logger: Any) -> bool:
    return _is_tensorboard(logger) or hasattr(logger, "log_image") or _is_mlflow(logger)


def _is_tensorboard(logger: Any) -> bool:
    return hasattr(getattr(logger, "experiment", None), "add_figure")


def _is_mlflow(logger: Any) -> bool:
    return hasattr(getattr(logger, "experiment", None), "log_figure") and hasattr(logger, "run_id")


def _log_figure(logger: Any, name: str, figure: Figure, step: int) -> None:
    """Log a figure: TensorBoard has `add_figure`, W&B and others `log_image`, and MLflow's client `log_figure`."""
    if _is_tensorboard(logger):
        logger.experiment.add_figure(name, figure, step)
    elif hasattr(logger, "log_image"):
        logger.log_image(key=name, images=[figure], step=step)
    else:
        logger.experiment.log_figure(logger.run_id, figure, f"{name}_{step}.png")
