"""Implements `lora-lightning export`."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lora_lightning.callbacks.merging import finetuning_of, load_merged
from lora_lightning.checkpoints import load_base
from lora_lightning.cli.onnx_file import example_input, require_onnx, write_onnx
from lora_lightning.report.files import free_path, refuse_to_overwrite


def export(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    ckpt_path: str | None = None,
    output: Path | None = None,
) -> Path:
    """Write a trained model to an ONNX file. Adapters are merged first.

    Args:
        trainer: A trainer, with the `LoRAFinetuning` of the training if the checkpoint contains adapters.
        model: The model of the training.
        datamodule: Provides the example input, the names of the classes and the preprocessing.
        ckpt_path: The checkpoint. It is not needed with `LoRAFinetuning(adapter=...)`.
        output: The file to write. By default `model.onnx`, or the first unused one of `model-v1.onnx`, ....

    Returns:
        The path of the file.

    Raises:
        ValueError: If there is no checkpoint or a package for ONNX is missing, and for the reasons of `write_onnx`.
        FileExistsError: If the file already exists.
    """
    callback = finetuning_of(trainer)
    if ckpt_path is None and (callback is None or callback.adapter is None):
        raise ValueError("export needs --ckpt_path, a checkpoint or a log folder, or --adapter, a folder of adapters.")
    output = free_path(Path("model.onnx")) if output is None else Path(output)
    refuse_to_overwrite(output)
    require_onnx()
    if callback is not None:
        load_merged(trainer, model, ckpt_path)
    else:
        load_base(model, Path(str(ckpt_path)))
    write_onnx(model, example_input(trainer, model, datamodule), output, datamodule)
    return output
