"""Writes the adapters of a run as a folder: those of the best checkpoint if a metric is monitored, else the last."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import fsspec
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lora_lightning.callbacks.summary import stage_metrics
from lora_lightning.lightning_packages import is_a
from lora_lightning.lora import adapter_names
from lora_lightning.lora.fingerprint import BaseDigests
from lora_lightning.lora.record import active_names, trained_names
from lora_lightning.peft_format.differences import unknown_to_peft
from lora_lightning.peft_format.folder import AdapterFolder
from lora_lightning.report.files import free_name, write_to
from lora_lightning.wording import some_of

BEST_ADAPTER = "lora_lightning_best_adapter"
"""Entry of a checkpoint that describes the best checkpoint so far."""


@dataclass(frozen=True)
class BestCheckpoint:
    """Describes the best checkpoint of a run.

    Attributes:
        path: The checkpoint.
        folder: The folder beside it with its adapters.
        monitor: Name of the metric.
        score: Value of the metric.
    """

    path: str
    folder: str
    monitor: str
    score: float

    @property
    def metrics(self) -> dict[str, float]:
        """Return the metric under its name without the stage."""
        return {self.monitor.removeprefix("val/").removeprefix("val_"): self.score}

    def in_words(self) -> str:
        """Return a description: `of epoch=3-step=40.ckpt, the best by val/accuracy: 0.97`."""
        return f"of {self.path.rpartition('/')[2]}, the best by {self.monitor}: {self.score:.4g}"


class RunAdapters:
    """Keeps the adapters of the best checkpoint of a run, and writes the adapter folder of the run.

    When a checkpoint is saved that is the best so far by a monitored metric, its adapters are copied from the state
    that is being saved, and written to a folder beside the checkpoint. Nothing is read from a checkpoint afterwards.

    Args:
        trainer: The trainer.
        pl_module: The adapted model.
        adapted: The part of the model that `attach` was called with.

    Attributes:
        base: Digests of the base, once they are known.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, adapted: nn.Module) -> None:
        self._trainer, self._pl_module, self._adapted = trainer, pl_module, adapted
        self.base: BaseDigests | None = None
        self._best: BestCheckpoint | None = None
        self._content: _Folders | None = None

    def saved(self, path: str, state: Mapping[str, Tensor]) -> None:
        """Keep the adapters in the state that is saved to a checkpoint, if this is the best one so far.

        Args:
            path: The checkpoint.
            state: The state of the model in it. If it lacks some adapters, those of the model are taken.
        """
        best = self._best_by_metric()
        if best is None or best.path != path:
            return
        prefix = next(name for name, module in self._pl_module.named_modules() if module is self._adapted)
        start = f"{prefix}." if prefix else ""
        values = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        self._content = _Folders(self._adapted, self.base, self._data(), best.metrics, values)
        self._best = best
        if self._trainer.is_global_zero:
            try:
                _remove(best.folder)
                write_to(best.folder, self._content.write)
            except OSError as error:
                rank_zero_warn(f"The adapters of {path} could not be written to {best.folder}: {error}.")

    def removed(self, path: str) -> None:
        """Remove the adapters beside a checkpoint that is removed."""
        if self._trainer.is_global_zero:
            _remove(_beside(path))

    def state(self) -> dict[str, object] | None:
        """Return the description of the best checkpoint so far, including one that is about to be saved."""
        found = self._best_by_metric() or self._best
        return None if found is None else asdict(found)

    def resume(self, state: Mapping[str, object]) -> None:
        """Continue with the best checkpoint that `state` described in an earlier run."""
        self._best = BestCheckpoint(
            str(state["path"]), str(state["folder"]), str(state["monitor"]), float(str(state["score"]))
        )
        self._content = None

    def write(self) -> tuple[Path | str | None, str]:
        """Write the adapter folder of the run. All processes have to call this.

        Returns:
            The folder (`None` if the run has none), and a description of the checkpoint (empty for the last state).
        """
        trainer = self._trainer
        folder = None if trainer.fast_dev_run else _run_folder(trainer)  # type: ignore[attr-defined] # set from elsewhere
        if folder is None:
            return None, ""
        place = trainer.strategy.broadcast(free_name(folder, "adapter"))
        best = self._chosen()
        if best is not None and self._content is None:  # of an earlier run, and not improved since
            if trainer.is_global_zero:
                write_to(place, _Copy(best.folder))
        else:
            content = self._content if best is not None else None
            if content is None:  # gathers distributed tensors, on all processes
                content = _Folders(self._adapted, self.base, self._data(), stage_metrics(trainer, "val"))
            if trainer.is_global_zero:
                write_to(place, content.write)
        return (place if "://" in place else Path(place)), (f", {best.in_words()}" if best else "")

    def _chosen(self) -> BestCheckpoint | None:
        """Return the best checkpoint whose adapters are known. All processes return the same."""
        best = self._best
        if best is not None and self._content is None and self._trainer.is_global_zero and not _exists(best.folder):
            rank_zero_warn(
                f"The adapters of the best checkpoint, {best.folder}, do not exist. The last ones are written."
            )
            best = None
        chosen: BestCheckpoint | None = self._trainer.strategy.broadcast(best)
        return chosen

    def _best_by_metric(self) -> BestCheckpoint | None:
        """Return the best checkpoint of this run so far, unless that of an earlier run is better."""
        files = self._trainer.checkpoint_callback
        if not is_a(files, ModelCheckpoint) or files.monitor is None or not files.best_model_path:
            return None
        if files.best_model_score is None:
            return None
        score, path = float(files.best_model_score), str(files.best_model_path)
        before = self._best
        if before is not None and before.path != path and before.monitor == files.monitor:
            better = score < before.score if files.mode == "min" else score > before.score
            if not better:
                return before
        return BestCheckpoint(path, _beside(path), files.monitor, score)

    def _data(self) -> str | None:
        data = self._trainer.datamodule  # type: ignore[attr-defined] # Trainer sets it from elsewhere
        return type(data).__name__ if data else None


def what_peft_refuses(adapted: nn.Module) -> str:
    """Return a sentence about the adapters for which PEFT refuses a folder, which is empty if there are none."""
    names = unknown_to_peft(adapted)
    if not names:
        return ""
    return (
        f". PEFT refuses this folder, since it would compute the adapters of {some_of(map(repr, names))} differently "
        "or ignore them; load_adapter and LoRAFinetuning read it"
    )


def how_a_library_saves(pl_module: LightningModule, checkpoints: str) -> str:
    """Return a sentence for models of other libraries, some of which save or reload them in their own way."""
    if checkpoints == "full" or type(pl_module).__module__.startswith("lora_lightning."):
        return ""
    return (
        " Before a library saves the whole model, call lora.merge, or train with checkpoints='full': its file then has "
        "the keys of the plain model, which it can load again."
    )


class _Folders:
    """Holds the content of the adapter folder of a run: the trained adapters.

    Those of several names are in folders of these names. Active adapters that are frozen are in folders already.

    Args:
        adapted: The part of the model that `attach` was called with.
        base: Digests of the base, if they are known.
        data: Name of the data that `metrics` were measured on.
        metrics: Metrics, by name.
        values: Values to write instead of those of the module, by state-dict key.
    """

    def __init__(
        self,
        adapted: nn.Module,
        base: BaseDigests | None,
        data: str | None,
        metrics: Mapping[str, float],
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        names = trained_names(adapted) or active_names(adapted)
        if len(adapter_names(adapted)) > 1:
            base = None  # each may have other modules that are trained in full
        self._folders = {
            (name if len(names) > 1 else ""): AdapterFolder(adapted, data, metrics, values, name, base)
            for name in names
        }

    def write(self, folder: Path) -> None:
        """Write the folder."""
        for name, content in self._folders.items():
            content.write(folder / name)


class _Copy:
    """Copies a folder."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __call__(self, target: Path) -> None:
        filesystem, path = fsspec.core.url_to_fs(self.source)
        filesystem.get(path, str(target), recursive=True)


def _beside(path: str) -> str:
    """Return the folder with the adapters of a checkpoint."""
    return f"{path.removesuffix('.ckpt')}.adapter"


def _exists(folder: str) -> bool:
    filesystem, path = fsspec.core.url_to_fs(folder)
    return bool(filesystem.exists(path))


def _remove(folder: str) -> None:
    if "://" not in folder:
        shutil.rmtree(folder, ignore_errors=True)
        return
    filesystem, path = fsspec.core.url_to_fs(folder)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def _run_folder(trainer: Trainer) -> str | None:
    """Return the log folder, or else the folder of the checkpoints. All processes have to call this.

    A logger that keeps metrics in memory or on a server has no log folder.
    """
    folder = trainer.log_dir if trainer.loggers else None
    if folder is None:
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return None if folder is None else str(folder)
