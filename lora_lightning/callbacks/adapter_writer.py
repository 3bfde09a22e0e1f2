"""Writes the adapters of a run as a folder: those of the best checkpoint if a metric is monitored, else the last."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lora_lightning.callbacks.adapted_part import adapted_part
from lora_lightning.callbacks.finished_bar import finish_bar
from lora_lightning.callbacks.summary import stage_metrics
from lora_lightning.checkpoints import NotFiniteError
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


_WITHOUT_MODELS = (
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "lora_lightning",
    "pytorch_lightning",
    "torch",
)
"""Packages of the bases of every `LightningModule`, and this one, whose models are read by this package."""


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


class AdapterWriter(Callback):
    """Writes the adapters of a run as a folder in PEFT's format: `<log folder>/adapter`, or `<checkpoints>/adapter`.

    They are those of the best checkpoint if `ModelCheckpoint` monitors a metric, else the last ones. When a checkpoint
    is saved that is the best so far, its adapters are copied from the state that is being saved, and written to a
    folder beside the checkpoint. Nothing is read from a checkpoint afterwards. If another callback fails after the last
    epoch, the folder is written nevertheless.

    `LoRAFinetuning` includes this callback. Add it to runs whose module attaches adapters itself. With
    `ModelParallelStrategy`, it then writes the last adapters.

    Attributes:
        folder: The folder that the last `fit` wrote, or `None` before, or if the run has no folder.

    Raises:
        ValueError: In `fit`, if `attach` was not called with one part of the module.
    """

    def __init__(self) -> None:
        self.folder: Path | str | None = None
        self._run: tuple[Trainer, LightningModule] | None = None
        self._files: CheckpointIO | None = None
        self._base: BaseDigests | None = None
        self._best: BestCheckpoint | None = None
        self._content: _Folders | None = None
        self._is_written = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.follow(trainer, pl_module)
            self._files = trainer.strategy.checkpoint_io
            trainer.strategy.checkpoint_io = _ListenedCheckpointIO(self._files, self)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._files is not None:
            trainer.strategy.checkpoint_io = self._files
        self._run = self._files = self._base = self._best = self._content = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Another callback may have failed after the last epoch. Several processes would wait for each other.
        is_trained = self._run is not None and trainer.state.fn == "fit" and trainer.fit_loop.done
        is_finite = not isinstance(exception, NotFiniteError)
        if is_trained and is_finite and not self._is_written and trainer.world_size == 1:
            try:
                self._write(trainer)
            except (OSError, ValueError) as error:  # the module may have been merged since
                exception.add_note(f"The adapters could not be written: {error}")
        self.teardown(trainer, pl_module, "fit")  # which Lightning does not call after an exception

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        adapted_part(pl_module)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        found = None if self._run is None else self._best_by_metric(trainer) or self._best
        if found is not None:  # possibly the one that is about to be saved
            checkpoint[BEST_ADAPTER] = asdict(found)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get(BEST_ADAPTER)
        if state is not None and self._run is not None:
            self._best = BestCheckpoint(
                str(state["path"]), str(state["folder"]), str(state["monitor"]), float(state["score"])
            )
            self._content = None

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        of_best = self._write(trainer)
        trainer.strategy.barrier("adapter folder")  # so that it exists on every device when fit returns
        finish_bar(trainer, pl_module)
        where = "This run writes no adapter"
        if self.folder is not None:
            where = f"Adapters written: {self.folder}{of_best}{_what_peft_refuses(adapted_part(pl_module))}"
        rank_zero_info(f"{where}.")

    def follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with a run of this module. `saved` and `removed` have to be called for its checkpoints."""
        self._run = (trainer, pl_module)
        self._base = self._best = self._content = None
        self._is_written = False

    def set_base(self, base: BaseDigests) -> None:
        """Set the digests of the base, which are computed for each folder otherwise."""
        self._base = base

    def saved(self, path: str, state: Mapping[str, Tensor]) -> None:
        """Keep the adapters in the state that is saved to a checkpoint, if this is the best one so far.

        Args:
            path: The checkpoint.
            state: The state of the model in it. If it lacks some adapters, those of the model are taken.
        """
        if self._run is None:  # a trainer can save a checkpoint after `fit`
            return
        trainer, pl_module = self._run
        best = self._best_by_metric(trainer)
        if best is None or best.path != path:
            return
        adapted = adapted_part(pl_module)
        prefix = next(name for name, module in pl_module.named_modules() if module is adapted)
        start = f"{prefix}." if prefix else ""
        values = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        self._content = _Folders(adapted, self._base, _data_of(trainer), best.metrics, values)
        self._best = best
        if trainer.is_global_zero:
            try:
                _remove(best.folder)
                write_to(best.folder, self._content.write)
            except OSError as error:
                rank_zero_warn(f"The adapters of {path} could not be written to {best.folder}: {error}.")

    def removed(self, path: str) -> None:
        """Remove the adapters beside a checkpoint that is removed."""
        if self._run is not None and self._run[0].is_global_zero:
            _remove(_beside(path))

    def _write(self, trainer: Trainer) -> str:
        """Write the folder, and return a description of its checkpoint, which is empty for the last state.

        All processes have to call this.
        """
        self._is_written, self.folder = True, None
        assert self._run is not None
        adapted = adapted_part(self._run[1])
        parent = None if trainer.fast_dev_run else _run_folder(trainer)  # type: ignore[attr-defined] # set from elsewhere
        if parent is None:
            return ""
        place = trainer.strategy.broadcast(free_name(parent, "adapter"))
        best = self._chosen(trainer)
        if best is not None and self._content is None:  # of an earlier run, and not improved since
            if trainer.is_global_zero:
                write_to(place, _Copy(best.folder))
        else:
            content = self._content if best is not None else None
            if content is None:  # gathers distributed tensors, on all processes
                content = _Folders(adapted, self._base, _data_of(trainer), stage_metrics(trainer, "val"))
            if trainer.is_global_zero:
                write_to(place, content.write)
        self.folder = place if "://" in place else Path(place)
        return f", {best.in_words()}" if best else ""

    def _chosen(self, trainer: Trainer) -> BestCheckpoint | None:
        """Return the best checkpoint whose adapters are known. All processes return the same."""
        best = self._best
        if best is not None and self._content is None and trainer.is_global_zero and not _exists(best.folder):
            rank_zero_warn(
                f"The adapters of the best checkpoint, {best.folder}, do not exist. The last ones are written."
            )
            best = None
        chosen: BestCheckpoint | None = trainer.strategy.broadcast(best)
        return chosen

    def _best_by_metric(self, trainer: Trainer) -> BestCheckpoint | None:
        """Return the best checkpoint of this run so far, unless that of an earlier run is better."""
        files = trainer.checkpoint_callback
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


class _ListenedCheckpointIO(CheckpointIO):
    """Tells an `AdapterWriter` which checkpoints are saved and removed.

    `on_save_checkpoint` of a callback does not know the file, and is not called with `save_weights_only=True`.
    """

    def __init__(self, checkpoint_io: CheckpointIO, writer: AdapterWriter) -> None:
        super().__init__()
        self.checkpoint_io, self.writer = checkpoint_io, writer

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        self.writer.saved(str(path), checkpoint.get("state_dict", {}))
        self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)

    @override
    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        loaded: dict[str, Any] = self.checkpoint_io.load_checkpoint(path, *args, **kwargs)
        return loaded

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        self.checkpoint_io.remove_checkpoint(path)
        self.writer.removed(str(path))

    @override
    def teardown(self) -> None:
        self.checkpoint_io.teardown()


def _data_of(trainer: Trainer) -> str | None:
    data = trainer.datamodule  # type: ignore[attr-defined] # Trainer sets it from elsewhere
    return type(data).__name__ if data else None


def _what_peft_refuses(adapted: nn.Module) -> str:
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
    if checkpoints == "full" or not any(map(_is_of_a_library, type(pl_module).__mro__)):
        return ""
    return (
        "Before a library saves the whole model, call lora.merge, or train with checkpoints='full': its file then has "
        "the keys of the plain model, which it can load again."
    )


def _is_of_a_library(cls: type) -> bool:
    """Return whether a class belongs to an installed library that brings its own models."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    is_installed = file is not None and "site-packages" in Path(file).parts
    return is_installed and cls.__module__.partition(".")[0] not in _WITHOUT_MODELS


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
