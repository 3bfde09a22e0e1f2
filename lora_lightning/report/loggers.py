"""Logs figures to loggers that support them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_figure(logger: Any, name: str, figure: Figure, step: int) -> None:
    """Log a figure through the interface of the logger, if it supports images.

    TensorBoard has `add_figure`, W&B and others have `log_image`, and MLflow's client has `log_figure`.
    """
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):
        experiment.add_figure(name, figure, step)
    elif hasattr(logger, "log_image"):
        logger.log_image(key=name, images=[figure], step=step)
    elif hasattr(experiment, "log_figure") and hasattr(logger, "run_id"):
        experiment.log_figure(logger.run_id, figure, f"{name}_{step}.png")
