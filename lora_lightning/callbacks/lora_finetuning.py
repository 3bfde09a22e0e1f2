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

from lora_lightning.callbacks.adapter_folder import BEST_ADAPTER, RunAdapters, how_a_library_saves, what_peft_refuses
from lora_lightning.callbacks.adapters_of_run import (
    Folder,
    attach_adapters,
    check_present_adapters,
    has_no_start_yet,
)
from lora_lightning.callbacks.averaged_base import average_with_adapters, restore_averaged_base, restore_statistics
from lora_lightning.callbacks.base_of_run import load_base_of_run, say_that_the_model_is_the_base
from lora_lightning.callbacks.finished_bar import finish_bar
from lora_lightning.callbacks.frozen_base import FrozenBase
from lora_lightning.callbacks.late_layers import AfterLayers, convert_layers
from lora_lightning.callbacks.lora_arguments import describes_new_adapters, plain, plain_arguments
from lora_lightning.callbacks.spawned_adapters import SpawnedAdapters
from lora_lightning.callbacks.summary import trained_parameters, what_trains
from lora_lightning.callbacks.trained import TrainedModel
from lora_lightning.callbacks.training_checks import (
    FiniteAdapters,
    UntrainedAdapters,
    check_optimizers,
    refuse_pruning,
    refuse_strategy,
    warn_of_idle_dropout,
)
from lora_lightning.checkpoints import NotFiniteError, RandomState
from lora_lightning.checkpoints.adapter_checkpoint import AdapterCheckpointIO, AdapterContent
from lora_lightning.checkpoints.atomic_checkpoint import write_atomically
from lora_lightning.checkpoints.own_states import OwnStates
from lora_lightning.checkpoints.packed_layers import let_packed_keys_be_missing
from lora_lightning.checkpoints.sharded_checkpoints import ShardedCheckpoints
from lora_lightning.lightning_packages import is_a
from lora_lightning.lora import LoRAConfig, backbone_of, base_fingerprint, detach, is_adapted, is_untrained
from lora_lightning.lora.fingerprint import BaseDigests
from lora_lightning.lora.packed import keep_packing
from lora_lightning.lora.sharding import distribute_adapters
from lora_lightning.wording import some_of


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
        self.base_in_words = ""
        if checkpoints not in ("adapters", "full"):
            raise ValueError(f"checkpoints={checkpoints!r}: expected 'adapters' or 'full'.")
        self.adapter: list[Folder] | Folder | None = plain(adapter)
        self.checkpoints = checkpoints
        self.verify = verify
        self.adapter_folder: Path | str | None = None
        self.adapted: nn.Module | None = None
        self.trained: TrainedModel | None = None
        self._random_state = RandomState()
        self._spawned = SpawnedAdapters()
        self._after_layers: AfterLayers | None = None
        self._checkpoints: AdapterCheckpointIO | ShardedCheckpoints | None = None
        self._handles: list[RemovableHandle] = []
        self._base: BaseDigests | None = None
        self._frozen: FrozenBase | None = None
        self._finite: FiniteAdapters | None = None
        self._untrained: UntrainedAdapters | None = None
        self._result: RunAdapters | None = None
        self._updated: set[str] = set()
        self._is_written = False
        self._is_first_batch = False

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
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._base = self._frozen = self._finite = self._untrained = self._result = self._checkpoints = None
        if self._after_layers is not None:
            self._after_layers.remove()
            self._after_layers = None

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException | None = None
    ) -> None:
        if exception is None:  # the class is among the callbacks, as `setup` says
            return
        # Another callback may have failed after the last epoch. Several processes would wait for each other.
        is_trained = self._result is not None and trainer.state.fn == "fit" and trainer.fit_loop.done
        if (
            is_trained
            and not self._is_written
            and trainer.world_size == 1
            and not isinstance(exception, NotFiniteError)
        ):
            try:
                self._write_result(trainer)
            except OSError as error:
                exception.add_note(f"The adapters could not be written: {error}")
        self.teardown(trainer, pl_module, "fit")  # which Lightning does not call after an exception

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_written, self._is_first_batch = False, True
        self._random_state.on_fit_start(trainer, pl_module)
        if self._after_layers is not None:
            self._after_layers.remove()
        refuse_pruning(trainer)
        check_optimizers(trainer, pl_module, self._network)
        # Not in setup, since a precision such as bf16-true converts the base after it.
        self._frozen = FrozenBase(self._network, self._base if trainer.world_size == 1 else None)
        if self._checkpoints is not None:
            self._checkpoints.content.at_start = self._frozen.updatable
        if self._result is not None:
            self._result.base = self._frozen.base
        self._finite = FiniteAdapters(self._network, self._checkpoints)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._random_state.on_train_start(trainer, pl_module)
        self._untrained = UntrainedAdapters(self._network, trainer.global_step) if self.verify else None

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._random_state.on_train_epoch_start(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._random_state.on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx == 0:  # after the other callbacks have started the epoch
            check_optimizers(trainer, pl_module, self._network)
            restore_statistics(trainer, pl_module)
        if self._is_first_batch:
            self._is_first_batch = False
            warn_of_idle_dropout(self._network)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._random_state.on_train_batch_end(trainer)
        assert self._finite is not None
        self._finite.look(trainer, outputs)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._random_state.on_validation_start(trainer, pl_module)
        if trainer.state.fn == "fit":
            restore_averaged_base(trainer, pl_module, self._network)
        self._say_if_fresh(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._random_state.on_validation_end(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._frozen is not None
        assert self._finite is not None
        self._finite.check(trainer)
        restore_averaged_base(trainer, pl_module, self._network)
        self._frozen.warn_of_changes()
        if self._untrained is not None:
            untrained, self._untrained = self._untrained, None
            untrained.warn(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restore_averaged_base(trainer, pl_module, self._network)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._say_if_fresh(trainer)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._say_if_fresh(trainer)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._random_state.on_save_checkpoint(trainer, pl_module, checkpoint)
        best = None if self._result is None else self._result.state()
        if best is not None:
            checkpoint[BEST_ADAPTER] = best

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._random_state.on_load_checkpoint(trainer, pl_module, checkpoint)
        if self._result is not None and BEST_ADAPTER in checkpoint:
            self._result.resume(checkpoint[BEST_ADAPTER])

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the adapter folder, and then check that the base has not changed."""
        of_best = self._write_result(trainer)
        trainer.strategy.barrier("adapter folder")  # so that it exists on every device when fit returns
        self.trained = TrainedModel.of(trainer, pl_module, self)
        assert self._frozen is not None
        frozen, updated = self._frozen.changed()
        if frozen:
            raise RuntimeError(
                f"The frozen base changed during training: {some_of(map(repr, frozen))}. Some code writes to them, for "
                f"example an optimizer that has these parameters. Adapter: {self.adapter_folder}."
            )
        kind, names = self._frozen.kind_of(updated), some_of(map(repr, updated))
        but = f", but for {kind} that the model's own code changes: {names}" if updated else ""
        where = "This run writes no adapter"
        if self.adapter_folder:
            where = f"Adapter: {self.adapter_folder}{of_best}{what_peft_refuses(self._network)}"
        self.base_in_words = f"bitwise unchanged{but} (SHA-256 {self.base_fingerprint[:12]})"
        saving = how_a_library_saves(pl_module, self.checkpoints)
        finish_bar(trainer, pl_module)
        rank_zero_info(f"The base is {self.base_in_words}. {where}.{saving}")

    def _repr_html_(self) -> str:
        """Return what the last `fit` trained as a table for a notebook."""
        if self.trained is None:
            return "<p>LoRAFinetuning: nothing trained yet. Call <code>trainer.fit</code>.</p>"
        return self.trained._repr_html_()

    def _write_result(self, trainer: Trainer) -> str:
        """Write the adapter folder, and return a description of the checkpoint that it holds."""
        self._is_written = True
        assert self._result is not None
        self.adapter_folder, of_best = self._result.write()
        self._spawned.save(trainer, self._network, self.adapter_folder)
        return of_best

    @property
    def _network(self) -> nn.Module:
        """Return the adapted network, which exists after `setup`."""
        assert self.adapted is not None, "nothing is attached before setup"
        return self.adapted

    def _say_if_fresh(self, trainer: Trainer) -> None:
        if trainer.state.fn != "fit" and is_untrained(self._network):
            rank_zero_info("The adapters are untrained and have no effect. Pass trained ones as ckpt_path.")

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
        self._base = BaseDigests.of(self.adapted) if trainer.state.fn == "fit" else None
        digest = base_fingerprint(self.adapted) if self._base is None else self._base.fingerprint
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
        self._result = RunAdapters(trainer, pl_module, self._network)
        if is_a(trainer.strategy, ModelParallelStrategy):
            if is_full:
                raise ValueError(
                    "checkpoints='full' is not possible where ModelParallelStrategy distributes the weights."
                )
            distribute_adapters(self._network, trainer.strategy.device_mesh["data_parallel"].get_group())
            self._checkpoints = ShardedCheckpoints(trainer.strategy, content, self._result)
            return
        self._handles.append(let_packed_keys_be_missing(pl_module))
        self._checkpoints = AdapterCheckpointIO(write_atomically(files), trainer.strategy, content, self._result)
        trainer.strategy.checkpoint_io = self._checkpoints

    def trained_parameters(self) -> str:
        """Return the number of trained parameters: `6,794 of 2,813,804 parameters, 0.242% of the base`."""
        return trained_parameters(self._network)
