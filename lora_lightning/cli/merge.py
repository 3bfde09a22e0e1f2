"""Implements `lora-lightning merge`."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lora_lightning.callbacks.merging import load_merged, save_merged
from lora_lightning.cli.onnx_file import example_input, require_onnx, write_onnx
from lora_lightning.report.files import free_path, refuse_to_overwrite


def merge(
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
        output: The plain checkpoint to write, for `base_checkpoint` or `ckpt_path`. By default `merged.ckpt`, or the
            first unused one of `merged-v1.ckpt`, ....
        onnx: An ONNX file to write in addition.

    Returns:
        The path of the checkpoint.

    Raises:
        ValueError: If there is nothing to merge, or if the outputs of the ONNX file differ from the model.
        FileExistsError: If a file to write already exists.
    """
    output = free_path(Path("merged.ckpt")) if output is None else Path(output)
    for path in (output, onnx):
        if path is not None:
            refuse_to_overwrite(Path(path))
    if onnx is not None:
        require_onnx()
    load_merged(trainer, model, ckpt_path)
    if onnx is not None:
        write_onnx(model, example_input(trainer, model, datamodule), onnx, datamodule)
    save_merged(trainer, output)
    return output
