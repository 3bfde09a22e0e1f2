"""Writes the files of a run except checkpoints: reports, curves, facts about the run, and `report.html`."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

import lora_lightning
from lora_lightning.callbacks.log_folder import log_folder
from lora_lightning.callbacks.logged_results import log_scalar
from lora_lightning.callbacks.merging import finetuning_of
from lora_lightning.callbacks.summary import trained_and_total
from lora_lightning.lightning_packages import is_a
from lora_lightning.lora import backbone_of, is_adapted
from lora_lightning.lora.record import active_names, attachment_of
from lora_lightning.report import write_page
from lora_lightning.report.figure import write_png
from lora_lightning.report.files import free_name, write_to
from lora_lightning.report.history import History, curves_figure
from lora_lightning.report.layers import layer_changes
from lora_lightning.report.page import page_of


class RecordedMetrics:
    """Records the logged metrics of a run as often as the loggers receive them, and the learning rate.

    The trainer keeps a metric until it is measured again, for example that of a validation during the next training
    steps. Such a value is recorded once.
    """

    def __init__(self) -> None:
        self.history = History()
        self._recorded: dict[str, Tensor] = {}
        """The latest recorded value of each metric. A new measurement is another tensor."""

    def after_batch(self, trainer: Trainer) -> None:
        """Record the metrics of this step if they are logged."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined] # Trainer sets it from elsewhere
        if every and trainer.global_step % every == 0:
            metrics = self._measured(trainer.logged_metrics)
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            for group in groups[:1]:  # empty if configure_optimizers returned None
                metrics["lr"] = float(group["lr"])
                if not any(is_a(each, LearningRateMonitor) for each in trainer.callbacks):  # type: ignore[attr-defined]
                    log_scalar(trainer, "lr", metrics["lr"])
            self._record(trainer, metrics)

    def after_validation(self, trainer: Trainer) -> None:
        """Record the metrics of a validation."""
        self._record(trainer, self._measured(trainer.callback_metrics))

    def after_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metrics of a training epoch, and log the norm of ΔW over all layers."""
        metrics = self._measured(trainer.callback_metrics)
        if trainer.is_global_zero and (layers := layer_changes(pl_module, with_base=False)):
            metrics["delta_norm"] = sum(each["norm"] ** 2 for each in layers) ** 0.5
            log_scalar(trainer, "delta_norm", metrics["delta_norm"])
        self._record(trainer, metrics)

    def _measured(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Return the metrics that were measured since they were last recorded."""
        found = {}
        for name, value in metrics.items():
            before = self._recorded.get(name)
            if isinstance(value, Tensor):
                if before is not None and before.data_ptr() == value.data_ptr():
                    continue
                self._recorded[name] = value
            found[name] = float(value)
        return found

    def _record(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if trainer.is_global_zero and metrics:
            self.history.record(trainer.global_step, metrics)

    def write(self, trainer: Trainer, pl_module: LightningModule, validations: Mapping[str, Any]) -> None:
        """Write `metrics.csv`, `curves.png` and the report with the result of the validations to the log folder."""
        folder = log_folder(trainer)
        if folder is None or not trainer.is_global_zero or not self.history.rows:
            return
        of_this_name = [logger for logger in trainer.loggers if is_a(logger, CSVLogger)]
        for logger in of_this_name:
            logger.save()
        if not of_this_name:
            write_to(free_name(folder, "metrics.csv"), self.history.write)
        if (figure := curves_figure(self.history)) is not None:
            figure.set_facecolor("white")
            write_to(free_name(folder, "curves.png"), partial(write_png, figure))
        write_facts(trainer, pl_module, folder, validations)
        write_run_page(folder)


def facts_of_verdict(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Return what a verdict and the first number of a page need to know of a run."""
    return {"trained_in_full": _trained_in_full(pl_module), "focus": _classes_in_focus(trainer)}


def _classes_in_focus(trainer: Trainer) -> list[str]:
    """Return the names of the classes that the data module has in focus."""
    focus = getattr(getattr(trainer, "datamodule", None), "focus", None)
    named = focus if isinstance(focus, list | tuple) else [focus]
    return [str(each) for each in named if isinstance(each, int | str)]


def write_facts(
    trainer: Trainer, pl_module: LightningModule, folder: str, further: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write `run.json` with what is known and `further` facts, and return it. If it exists, it is only read."""
    if "://" not in folder and (path := Path(folder) / "run.json").is_file():
        try:
            known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            rank_zero_warn(f"{path} could not be read: {type(error).__name__}: {error}")
            return facts_of_verdict(trainer, pl_module)
        return known
    packages: tuple[Any, ...] = (lora_lightning, torch, lightning)
    trained, total = trained_and_total(pl_module)
    checkpoint = trainer.ckpt_path if trainer.state.fn != "fit" else None
    facts = {
        "command": shlex.join([_program(), *sys.argv[1:]]),
        "finished": datetime.now().astimezone().isoformat(" ", "minutes"),
        "seed": os.environ.get("PL_GLOBAL_SEED"),
        "versions": {"python": platform.python_version()} | {each.__name__: each.__version__ for each in packages},
        "device": type(trainer.accelerator).__name__.removesuffix("Accelerator"),
        "devices": trainer.world_size,
        "machine": machine_in_words(),
        "trained": trained,
        "total": total,
        "layers": layer_changes(pl_module) if is_adapted(pl_module) else [],
        "base": _base_in_words(trainer),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        **facts_of_verdict(trainer, pl_module),
        **(_of_training(trainer) if trainer.state.fn == "fit" else {}),
        **(further or {}),
    }
    if (place := free_name(folder, "run.json")).endswith("run.json"):
        write_to(place, lambda file: file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8"))
    return facts


def add_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Add facts to `run.json` in a folder, and write the report of the run again. A failure is a warning."""
    path = folder / "run.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(known | dict(facts), indent=1) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        rank_zero_warn(f"{path} could not be written: {type(error).__name__}: {error}")
        return
    write_run_page(str(folder))


def write_run_page(folder: str) -> Path | None:
    """Write the report of the run in a local folder, and return its path. A failure is a warning."""
    if "://" in folder:
        return None
    try:
        path = page_of(Path(folder))
        write_page([Path(folder)], path)
        return path
    except Exception as error:  # noqa: BLE001 - a page must not cost a run
        rank_zero_warn(f"The page report.html could not be written to {folder}: {type(error).__name__}: {error}")
        return None


def _program() -> str:
    """Return the name of the command. `python -m lora_lightning` has the same one."""
    program = Path(sys.argv[0])
    is_module = (program.parent.name, program.name) == ("lora_lightning", "__main__.py")
    return "lora-lightning" if is_module else program.name


def machine_in_words() -> str:
    """Return the number of cores and threads, and the name of the GPU: `2 CPU cores, 1 thread`."""
    threads = torch.get_num_threads()
    cores = f"{os.cpu_count()} CPU cores, {threads} thread{'s' if threads > 1 else ''}"
    return f"{torch.cuda.get_device_name()}, {cores}" if torch.cuda.is_available() else cores


def _trained_in_full(pl_module: LightningModule) -> list[str]:
    """Return the modules without adapters that are trained beside them, such as a new head."""
    if not is_adapted(pl_module):
        return []
    adapted = backbone_of(pl_module)
    saved = attachment_of(adapted).saved
    return [name for each in active_names(adapted) if each in saved for name in saved[each].names]


def _base_in_words(trainer: Trainer) -> str:
    callback = finetuning_of(trainer)
    return "" if callback is None else callback.base_in_words


def _of_training(trainer: Trainer) -> dict[str, Any]:
    """Return the number of epochs, and the best checkpoint."""
    checkpoint, found = trainer.checkpoint_callback, {"epochs": trainer.current_epoch}
    score = getattr(checkpoint, "best_model_score", None)
    best = {
        "path": str(getattr(checkpoint, "best_model_path", "")),
        "monitor": getattr(checkpoint, "monitor", None),
        "mode": getattr(checkpoint, "mode", None),
        "score": None if score is None else float(score),
    }
    return found | ({"best": best} if best["path"] else {})
