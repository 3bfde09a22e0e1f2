"""Merges the adapters of a training into its base, and writes a plain checkpoint."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lora_lightning.callbacks.lora_finetuning import LoRAFinetuning
from lora_lightning.checkpoints.adapter_checkpoint import AdapterCheckpointIO
from lora_lightning.lora import merge


def finetuning_of(trainer: Trainer) -> LoRAFinetuning | None:
    """Return the `LoRAFinetuning` of a trainer, if any."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined] # Trainer sets it from elsewhere
    return next((callback for callback in callbacks if isinstance(callback, LoRAFinetuning)), None)


def load_merged(trainer: Trainer, model: LightningModule, ckpt_path: str | Path | None = None) -> None:
    """Load the base and the adapters into the model as a trainer does, and merge them.

    Args:
        trainer: A trainer with the `LoRAFinetuning` of the training.
        model: The model of the training.
        ckpt_path: The checkpoint with the adapters. It is not needed with `LoRAFinetuning(adapter=...)`.

    Raises:
        ValueError: If there is nothing to merge.
    """
    callback = finetuning_of(trainer)
    if callback is None or (ckpt_path is None and callback.adapter is None):
        missing = "--ckpt_path, a checkpoint with adapters" if callback else "a LoRAFinetuning among trainer.callbacks"
        raise ValueError(f"merge needs {missing}. Pass the configuration of the training.")
    trainer.strategy.connect(model)
    trainer.ckpt_path = ckpt_path
    callback.setup(trainer, model, "test")
    if callback.adapted is None:  # the layers are created in a hook that a trainer would call
        model.setup("test")
        model.configure_model()
    files = trainer.strategy.checkpoint_io
    assert isinstance(files, AdapterCheckpointIO)
    assert callback.adapted is not None
    if ckpt_path is not None:
        model.load_state_dict(files.load_checkpoint(ckpt_path)["state_dict"])
    merge(callback.adapted)


def save_merged(trainer: Trainer, output: Path) -> None:
    """Write the model of `load_merged` to a plain checkpoint."""
    trainer.save_checkpoint(output, weights_only=True)
    rank_zero_info(f"Merged: {output}")
