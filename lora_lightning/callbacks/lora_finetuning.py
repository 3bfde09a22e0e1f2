"""Defines `LoRAFinetuning`, which turns the training of any LightningModule into LoRA fine-tuning."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lora_lightning.callbacks.adapter_writer import AdapterWriter, how_a_library_saves
from lora_lightning.callbacks.adapters_of_run import (
    Folder,
    attach_adapters,
    check_present_adapters,
    has_no_start_yet,
)
from lora_lightning.callbacks.averaged_base import AveragedBase, average_with_adapters
from lora_lightning.callbacks.base_of_run import load_base_of_run, say_that_the_model_is_the_base
from lora_lightning.callbacks.finite_adapters import FiniteAdapters
from lora_lightning.callbacks.frozen_base import FrozenBase
from lora_lightning.callbacks.late_layers import AfterLayers, convert_layers
from lora_lightning.callbacks.lora_arguments import describes_new_adapters, plain, plain_arguments
from lora_lightning.callbacks.spawned_adapters import SpawnedAdapters
from lora_lightning.callbacks.summary import trained_parameters, what_trains
from lora_lightning.callbacks.trained import TrainedModel
from lora_lightning.callbacks.training_checks import TrainingChecks, refuse_strategy
from lora_lightning.callbacks.untrained_adapters import UntrainedAdapters
from lora_lightning.checkpoints import NotFiniteError, RandomState
from lora_lightning.checkpoints.adapter_checkpoint import AdapterCheckpointIO, AdapterContent
from lora_lightning.checkpoints.atomic_checkpoint import write_atomically
from lora_lightning.checkpoints.own_states import OwnStates
from lora_lightning.checkpoints.packed_layers import let_packed_keys_be_missing
from lora_lightning.checkpoints.sharded_checkpoints import ShardedCheckpoints
from lora_lightning.lightning_packages import is_a
from lora_lightning.lora import LoRAConfig, backbone_of, base_fingerprint, detach, is_adapted
from lora_lightning.lora.fingerprint import BaseDigests
from lora_lightning.lora.packed import keep_packing
from lora_lightning.lora.sharding import distribute_adapters


class LoRAFinetuning(Callback):
    """Freezes a trained model, attaches adapters before the optimizer is created, and trains only the adapters.

    The callback works with any `LightningModule` whose layers exist after `__init__`, `setup` or `configure_model`, and
    whose `configure_optimizers` uses all parameters or those that require gradients. Checkpoints contain the adapters
    without the base, and can be passed as `ckpt_path`. At the end of `fit`, the adapters are written in PEFT's format
    to `<log folder>/adapter`, or without a log folder to `<checkpoints>/adapter`. They are those of the best checkpoint
    if `ModelCheckpoint` monitors a metric, else the last ones. Checkpoints include random states, as with
    `RandomState`. With `init="eva"`, `fit` runs `training_step` of a copy of the module on the first 8 training batches
    to find ranks, before the optimizer is created. A run that starts from a checkpoint has its ranks.

    Args:
        config: A `LoRAConfig` or its arguments, instead of or in addition to `arguments`.
        base_checkpoint: Checkpoint of the base, a file of Lightning or a bare state dict, or a log folder, whose newest
            checkpoint is used. `None` adapts the model as it is.
        weights_only: Whether to refuse `base_checkpoint` if it holds objects other than tensors and plain values, as in
            `torch.load`. `False` makes them, which may run code. With `None`, they are neither refused nor made, as
            only tensors are needed.
        adapter: Folder of adapters to start from, written by `fit` or PEFT, or a log folder, whose newest adapter is
            used. The folder determines the adapted layers, and `config` is ignored. `None` creates new adapters. A list
            of folders adds up their adapters under the names of the folders, or `adapter_1`, .... With arguments of
            `LoRAConfig` other than the defaults, these adapters stay frozen, and new ones are trained beside them;
            without any, they are trained themselves.
        checkpoints: What checkpoints hold. `"adapters"`: the adapters without the base. `"full"`: the merged weights
            under the keys of the plain model, for libraries that read checkpoints themselves, and the adapters beside
            them for resuming. After `fit`, a model without adapters is then used as it is.
        verify: Whether to warn after the first epoch about adapters that training has not changed.
        arguments: The arguments of `LoRAConfig`. Names can be relative to the adapted child or to the whole module. New
            last layers of `image_backbone` and `text_backbone` are added to `modules_to_save` if this is a list.

    Attributes:
        adapter_folder: The folder of the adapters that the last `fit` wrote, or `None` before.
        trained: A description of what the last `fit` trained, or `None` before. In a notebook, the callback shows it
            as a table.

    Raises:
        ValueError: If a value is out of range. In `setup`, for the reasons of `attach`, if a checkpoint or folder does
            not fit, or if the model already has other adapters. In `fit`, if the optimizer lacks the adapters or has
            other parameters.
        FileNotFoundError: In `setup`, if a checkpoint or folder does not exist.
        NotFiniteError: In `fit`, if the adapters contain NaN or infinity.
        RuntimeError: At the end of `fit`, if the frozen base has changed.

    Example::

        callback = LoRAFinetuning(rank=1, base_checkpoint="logs/pretrain")
        trainer = Trainer(callbacks=[callback, ConfusionReport()])
        trainer.fit(Classifier(RichBoyNet()), datamodule=MNISTDataModule(focus=[9]))
    """

    def __init__(
        self,
        config: LoRAConfig | Mapping[str, Any] | None = None,
        *,
        base_checkpoint: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
        adapter: list[str | os.PathLike[str]] | str | os.PathLike[str] | None = None,
        checkpoints: Literal["adapters", "full"] = "adapters",
        verify: bool = True,
        **arguments: Any,
    ) -> None:
        arguments = plain_arguments(config, arguments)
        self.config = LoRAConfig(**arguments)  # which tells jsonargparse what the arguments are
        self._trains_new = describes_new_adapters(arguments)
        self.base_checkpoint = base_checkpoint
        self.weights_only = weights_only
        self.base_path: Path | None = None
        self.base_fingerprint = ""
        if checkpoints not in ("adapters", "full"):
            raise ValueError(f"checkpoints={checkpoints!r}: expected 'adapters' or 'full'.")
        self.adapter: list[Folder] | Folder | None = plain(adapter)
        self.checkpoints = checkpoints
        self.adapted: nn.Module | None = None
        self.trained: TrainedModel | None = None
        self._writer = AdapterWriter()
        self._frozen_base = FrozenBase()
        self._parts: tuple[Callback, ...] = (
            RandomState(),
            TrainingChecks(),
            FiniteAdapters(),
            AveragedBase(),
            self._writer,  # before what may fail
            self._frozen_base,
            UntrainedAdapters(verify),
        )
        self._spawned = SpawnedAdapters()
        self._after_layers: AfterLayers | None = None
        self._checkpoints: AdapterCheckpointIO | ShardedCheckpoints | None = None
        self._handles: list[RemovableHandle] = []
        self._updated: set[str] = set()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule | None = None, stage: str = "") -> None:
        if pl_module is None:  # Lightning calls the function of the class, whose `self` is then the trainer
            raise TypeError("callbacks=[LoRAFinetuning] has the class; expected an object: LoRAFinetuning(rank=4).")
        if is_adapted(pl_module) and self.adapted is not backbone_of(pl_module):
            source = next((name for name in ("base_checkpoint", "adapter") if getattr(self, name) is not None), None)
            check_present_adapters(pl_module, self.config, source)
            self.adapted = None
        refuse_strategy(trainer.strategy)
        attach = partial(self._attach_if_missing, trainer, pl_module, stage)
        self._after_layers = AfterLayers(trainer, pl_module, attach, partial(self._prepare, trainer, pl_module, stage))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for part in self._parts:
            part.teardown(trainer, pl_module, stage)
        for handle in self._handles:
            handle.remove()
        self._handles, self._checkpoints = [], None
        if self._after_layers is not None:
            self._after_layers.remove()
            self._after_layers = None

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException | None = None
    ) -> None:
        if exception is None:  # the class is among the callbacks, as `setup` says
            return
        if self._checkpoints is not None and isinstance(exception, NotFiniteError):
            self._checkpoints.closed = True  # for a ModelCheckpoint that saves on exceptions
        for part in self._parts:
            part.on_exception(trainer, pl_module, exception)
        self.teardown(trainer, pl_module, "fit")  # which Lightning does not call after an exception

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trained = None
        if self._after_layers is not None:
            self._after_layers.remove()
        for part in self._parts:
            part.on_fit_start(trainer, pl_module)
        self._writer.set_base(self._frozen_base.start.base)
        if self._checkpoints is not None:
            self._checkpoints.content.at_start = self._frozen_base.start.updatable

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the adapter folder, and then check that the base has not changed."""
        for part in self._parts:
            part.on_fit_end(trainer, pl_module)
        self._spawned.save(trainer, self._network, self.adapter_folder)
        self.trained = TrainedModel.of(trainer, pl_module, self)
        if advice := how_a_library_saves(pl_module, self.checkpoints):
            rank_zero_info(advice)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for part in self._parts:
            part.on_train_start(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for part in self._parts:
            part.on_train_epoch_start(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for part in self._parts:
            part.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for part in self._parts:
            part.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for part in self._parts:
            part.on_validation_start(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for part in self._parts:
            part.on_validation_end(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for part in self._parts:
            part.on_train_epoch_end(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for part in self._parts:
            part.on_train_end(trainer, pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for part in self._parts:
            part.on_test_start(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for part in self._parts:
            part.on_predict_start(trainer, pl_module)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for part in self._parts:
            part.on_save_checkpoint(trainer, pl_module, checkpoint)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for part in self._parts:
            part.on_load_checkpoint(trainer, pl_module, checkpoint)

    @property
    def adapter_folder(self) -> Path | str | None:
        """Return the folder of the adapters that the last `fit` wrote, or `None` before."""
        return self._writer.folder

    @property
    def base_in_words(self) -> str:
        """Return what the last `fit` found about the base, for example `bitwise unchanged (SHA-256 6831adb07804)`."""
        return self._frozen_base.in_words

    def _repr_html_(self) -> str:
        """Return what the last `fit` trained as a table for a notebook."""
        if self.trained is None:
            return "<p>LoRAFinetuning: nothing trained yet. Call <code>trainer.fit</code>.</p>"
        return self.trained._repr_html_()

    @property
    def _network(self) -> nn.Module:
        """Return the adapted network, which exists after `setup`."""
        assert self.adapted is not None, "nothing is attached before setup"
        return self.adapted

    def _attach_if_missing(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach adapters, unless the model has some, or was merged or read from a full checkpoint after a fit."""
        if self.adapted is not None and is_adapted(pl_module):
            if not has_no_start_yet(self.adapted, self.config):
                return
            detach(self.adapted)
        elif stage != "fit" and self.adapted is backbone_of(pl_module):
            rank_zero_info("The adapters of this model were merged or detached. It is used as it is.")
            return
        elif stage != "fit" and self.adapted is not None and self.checkpoints == "full":
            rank_zero_info(
                "This model has no adapters. It is used as it is, since it may be that of a full checkpoint."
            )
            self.adapted = backbone_of(pl_module)
            return
        self._adapt(trainer, pl_module)

    def _adapt(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_adapted(pl_module):
            if self.base_checkpoint is not None:
                self.base_path = load_base_of_run(pl_module, self.base_checkpoint, self.weights_only)
            elif self.adapter is None:
                say_that_the_model_is_the_base(trainer, pl_module)
            convert_layers(trainer, pl_module)
            trained = self._spawned.config()
            attach_adapters(trainer, pl_module, self.config, self.adapter, self._trains_new, trained)
        self.adapted = backbone_of(pl_module)
        self._updated = set()
        self._spawned.load(self.adapted)
        keep_packing(self.adapted)
        if not is_a(trainer.strategy, ModelParallelStrategy):
            OwnStates(pl_module, self.checkpoints == "full")
        # Without a seed, each process has a different base until `ddp` broadcasts that of the first one.
        base = BaseDigests.of(self.adapted) if trainer.state.fn == "fit" else None
        self._frozen_base.set_base(base)
        digest = base_fingerprint(self.adapted) if base is None else base.fingerprint
        self.base_fingerprint = trainer.strategy.broadcast(digest) if trainer.world_size > 1 else digest
        rank_zero_info(what_trains(self.adapted, trainer.state.fn == "fit"))

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare the run after the module is adapted."""
        average_with_adapters(trainer, pl_module, stage)
        files = trainer.strategy.checkpoint_io
        if isinstance(files, AdapterCheckpointIO):
            files = files.checkpoint_io
        base_path = str(self.base_path) if self.base_path else None
        is_full = self.checkpoints == "full" and is_adapted(pl_module)
        content = AdapterContent(pl_module, self._network, self.base_fingerprint, base_path, self._updated, is_full)
        self._writer.follow(trainer, pl_module)
        if is_a(trainer.strategy, ModelParallelStrategy):
            if is_full:
                raise ValueError(
                    "checkpoints='full' is not possible where ModelParallelStrategy distributes the weights."
                )
            distribute_adapters(self._network, trainer.strategy.device_mesh["data_parallel"].get_group())
            self._checkpoints = ShardedCheckpoints(trainer.strategy, content, self._writer)
            return
        self._handles.append(let_packed_keys_be_missing(pl_module))
        self._checkpoints = AdapterCheckpointIO(write_atomically(files), trainer.strategy, content, self._writer)
        trainer.strategy.checkpoint_io = self._checkpoints

    def trained_parameters(self) -> str:
        """Return the number of trained parameters: `6,794 parameters, 0.242% of the 2,807,010 that are frozen`."""
        return trained_parameters(self._network)
