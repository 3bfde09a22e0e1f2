"""Defines `LoRAFinetuning`, which turns the training of any LightningModule into LoRA fine-tuning."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lora_lightning.callbacks.adapter_folder import write_adapter_folder
from lora_lightning.callbacks.adapters_of_run import attach_adapters, check_present_adapters
from lora_lightning.callbacks.averaged_base import average_with_adapters, restore_averaged_base, restore_statistics
from lora_lightning.callbacks.frozen_base import FrozenBase
from lora_lightning.callbacks.handover import Handover
from lora_lightning.callbacks.late_layers import AfterLayers, convert_layers
from lora_lightning.callbacks.summary import trained_parameters, what_trains
from lora_lightning.callbacks.training_checks import (
    Finite,
    Untouched,
    check_optimizers,
    refuse_pruning,
    refuse_strategy,
)
from lora_lightning.checkpoints import RandomState, load_base, newest_checkpoint
from lora_lightning.checkpoints.adapter_checkpoint import AdapterCheckpointIO, AdapterContent
from lora_lightning.checkpoints.atomic_checkpoint import write_atomically
from lora_lightning.checkpoints.packed_layers import let_packed_keys_be_missing
from lora_lightning.checkpoints.sharded_checkpoints import ShardedCheckpoints
from lora_lightning.lightning_packages import is_a
from lora_lightning.lora import LoRAConfig, backbone_of, base_fingerprint, is_adapted, is_untrained
from lora_lightning.lora.packed import keep_packing
from lora_lightning.lora.sharding import distribute_adapters
from lora_lightning.wording import some_of

LR_RATIO_IS_OF_THE_OPTIMIZER = (
    "lr_ratio (LoRA+) belongs to the optimizer. Use Classifier(lr_ratio=16) or --model.lr_ratio 16, or in a module of your own "
    "lora.lora_plus_param_groups(module, lr, lr_ratio) in configure_optimizers."
)


class LoRAFinetuning(Callback):
    """Freezes a trained model, attaches adapters before the optimizer is created, and trains only the adapters.

    The callback works with any `LightningModule` whose layers exist after `__init__`, `setup` or `configure_model`, and whose
    `configure_optimizers` uses all parameters or those that require gradients. Checkpoints contain the adapters without the base, and
    can be passed as `ckpt_path`. At the end of `fit`, the adapters are written in PEFT's format to `<log folder>/adapter`, or without a
    logger to `<checkpoints>/adapter`. They are those of the best checkpoint if `ModelCheckpoint` monitors a metric, else the last ones.
    Checkpoints include random states, as with `RandomState`.

    Args:
        base_checkpoint: Lightning checkpoint of the base: a file, or a log folder, whose newest checkpoint is used. `None` adapts
            the model as it is.
        adapter: Folder of adapters to start from, written by `fit` or PEFT, or a log folder, whose newest adapter is used. The folder
            determines the adapted layers, and `config` is ignored. `None` creates new adapters.
        verify: Whether to warn after the first epoch about adapters that training has not changed.
        config: The arguments of `LoRAConfig`. Names can be relative to the adapted child or to the whole module. New last layers of
            `image_backbone` and `text_backbone` are added to `modules_to_save` if this is a list.

    Raises:
        ValueError: If a value is out of range. In `setup`, for the reasons of `attach`, if a checkpoint or folder does not fit, or if the
            model already has other adapters. In `fit`, if the optimizer lacks the adapters or has other parameters.
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
        *,
        base_checkpoint: str | os.PathLike[str] | None = None,
        adapter: str | os.PathLike[str] | None = None,
        verify: bool = True,
        **config: Any,
    ) -> None:
        if "lr_ratio" in config:
            raise ValueError(LR_RATIO_IS_OF_THE_OPTIMIZER)
        self.config = LoRAConfig(**config)
        self.base_checkpoint = base_checkpoint
        self.base_path: Path | None = None
        self.base_fingerprint = ""
        self.base_in_words = ""
        self.adapter = adapter
        self.verify = verify
        self.adapter_folder: Path | str | None = None
        self.adapted: nn.Module | None = None
        self._random_state = RandomState()
        self._handover = Handover()
        self._after_layers: AfterLayers | None = None
        self._checkpoints: AdapterCheckpointIO | ShardedCheckpoints | None = None
        self._handles: list[RemovableHandle] = []
        self._frozen: FrozenBase | None = None
        self._finite: Finite | None = None
        self._untouched: Untouched | None = None
        self._updated: set[str] = set()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if is_adapted(pl_module) and self.adapted is not backbone_of(pl_module):
            source = next((name for name in ("base_checkpoint", "adapter") if getattr(self, name) is not None), None)
            check_present_adapters(pl_module, self.config, source)
            self.adapted = None
        refuse_strategy(trainer.strategy)

        def adapt() -> None:
            if self.adapted is None or not is_adapted(pl_module):
                self._adapt(trainer, pl_module)

        self._after_layers = AfterLayers(trainer, pl_module, adapt, lambda: self._prepare(trainer, pl_module, stage))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._after_layers is not None:
            self._after_layers.remove()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_pruning(trainer)
        check_optimizers(trainer, pl_module, self._network)
        # Not in setup, since a precision such as bf16-true converts the base after it.
        self._frozen = FrozenBase(self._network)
        if self._checkpoints is not None:
            self._checkpoints.content.at_start = self._frozen.updatable
        self._finite = Finite(self._network, self._checkpoints)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._random_state.on_train_start(trainer, pl_module)
        self._untouched = Untouched(self._network, trainer.global_step) if self.verify else None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._random_state.on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx == 0:  # after the other callbacks have started the epoch
            check_optimizers(trainer, pl_module, self._network)
            restore_statistics(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
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
        if self._untouched is not None:
            untouched, self._untouched = self._untouched, None
            untouched.warn(trainer)

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

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._random_state.on_load_checkpoint(trainer, pl_module, checkpoint)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the adapter folder and check that the base has not changed."""
        assert self._frozen is not None
        self.adapter_folder, of_best = write_adapter_folder(trainer, pl_module, self._network)
        self._handover.put(trainer, self._network, self.adapter_folder)
        trainer.strategy.barrier("adapter folder")  # so that it exists on every device when fit returns
        frozen, updated = self._frozen.changed()
        if frozen:
            raise RuntimeError(
                f"The frozen base changed during training: {some_of(map(repr, frozen))}. Some code writes to them, for example an optimizer "
                f"that has these parameters. Adapter: {self.adapter_folder}."
            )
        kind, names = self._frozen.kind_of(updated), some_of(map(repr, updated))
        but = f", but for {kind} that the model's own code changes: {names}" if updated else ""
        where = f"Adapter: {self.adapter_folder}{of_best}" if self.adapter_folder else "This run writes no adapter."
        self.base_in_words = f"bitwise unchanged{but} (SHA-256 {self.base_fingerprint[:12]})"
        rank_zero_info(f"The base is {self.base_in_words}. {where}")

    @property
    def _network(self) -> nn.Module:
        """Return the adapted network, which exists after `setup`."""
        assert self.adapted is not None, "nothing is attached before setup"
        return self.adapted

    def _say_if_fresh(self, trainer: Trainer) -> None:
        if trainer.state.fn != "fit" and is_untrained(self._network):
            rank_zero_info("The adapters are untrained and have no effect. Pass trained ones as ckpt_path.")

    def _load_base(self, pl_module: LightningModule) -> None:
        """Load `base_checkpoint`, if any, into a model without adapters."""
        if self.base_checkpoint is not None:
            self.base_path = newest_checkpoint(self.base_checkpoint)
            rank_zero_info(f"Base: {self.base_path}")
            load_base(pl_module, self.base_path)

    def _adapt(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_adapted(pl_module):
            self._load_base(pl_module)
            convert_layers(trainer, pl_module)
            attach_adapters(pl_module, self.config, self.adapter)
        self.adapted = backbone_of(pl_module)
        self._updated = set()
        self._handover.take(self.adapted)
        keep_packing(self.adapted)
        # Without a seed, each process has a different base until `ddp` broadcasts that of the first one.
        digest = base_fingerprint(self.adapted)
        self.base_fingerprint = trainer.strategy.broadcast(digest) if trainer.world_size > 1 else digest
        rank_zero_info(what_trains(self.adapted))

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare the run after the module is adapted."""
        average_with_adapters(trainer, pl_module, stage)
        files = trainer.strategy.checkpoint_io
        if isinstance(files, AdapterCheckpointIO):
            files = files.checkpoint_io
        base_path = str(self.base_path) if self.base_path else None
        content = AdapterContent(pl_module, self._network, self.base_fingerprint, base_path, self._updated)
        if is_a(trainer.strategy, ModelParallelStrategy):
            distribute_adapters(self._network, trainer.strategy.device_mesh["data_parallel"].get_group())
            self._checkpoints = ShardedCheckpoints(trainer.strategy, content)
            return
        self._handles.append(let_packed_keys_be_missing(pl_module))
        self._checkpoints = AdapterCheckpointIO(write_atomically(files), trainer.strategy, content)
        trainer.strategy.checkpoint_io = self._checkpoints

    def trained_parameters(self) -> str:
        """Return the number of trained parameters: `6,794 of 2,813,804 parameters, 0.242% of the base`."""
        return trained_parameters(self._network)
