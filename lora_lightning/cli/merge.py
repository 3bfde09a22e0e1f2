"""Implements `lora-lightning merge`."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lora_lightning.callbacks import LoRAFinetuning
from lora_lightning.cli.onnx_file import example_input, require_onnx, write_onnx
from lora_lightning.lora import merge
from lora_lightning.report import free_path, refuse_to_overwrite
from lora_lightning.resume.adapter_checkpoint import AdapterCheckpointIO


def merge_checkpoint(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    ckpt_path: str | None = None,
    output: Path | None = None,
    onnx: Path | None = None,
) -> Path:
    """Merge trained adapters into their base and write a plain checkpoint.

    Args:
        trainer: A trainer with the `LoRAFinetuning` of the training.
        model: The model of the training.
        datamodule: Provides the example input for an ONNX file.
        ckpt_path: The checkpoint with the adapters. It is not needed with `LoRAFinetuning(adapter=...)`.
        output: The plain checkpoint to write, for `base_checkpoint` or `ckpt_path`. By default `merged.ckpt`, or the first unused one of
            `merged-v1.ckpt`, ....
        onnx: An ONNX file to write in addition.

    Returns:
        The path of the checkpoint.

    Raises:
        ValueError: If there is nothing to merge, or if the outputs of the ONNX file differ from the model.
        FileExistsError: If a file to write already exists.
    """
    callback = finetuning_of(trainer)
    if callback is None or (ckpt_path is None and callback.adapter is None):
        missing = "--ckpt_path, a checkpoint with adapters" if callback else "a LoRAFinetuning among trainer.callbacks"
        raise ValueError(f"merge needs {missing}. Pass the configuration of the training.")
    output = free_path(Path("merged.ckpt")) if output is None else Path(output)
    for path in (output, onnx):
        if path is not None:
            refuse_to_overwrite(Path(path))
    if onnx is not None:
        require_onnx()
    load_merged(trainer, model, callback, ckpt_path)
    if onnx is not None:
        write_onnx(model, example_input(trainer, model, datamodule), onnx, datamodule)
    trainer.save_checkpoint(output, weights_only=True)
    rank_zero_info(f"Merged: {output}")
    return output


def finetuning_of(trainer: Trainer) -> LoRAFinetuning | None:
    """Return the `LoRAFinetuning` of a trainer, if any."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined] # Trainer sets it from elsewhere
    return next((each for each in callbacks if isinstance(each, LoRAFinetuning)), None)


def load_merged(trainer: Trainer, model: LightningModule, callback: LoRAFinetuning, ckpt_path: str | None) -> None:
    """Load the base and the adapters into the model as a trainer does, and merge them."""
    trainer.strategy.connect(model)
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
