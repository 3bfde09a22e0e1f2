"""Exports a model to ONNX."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor

_TOLERANCE = 1e-4


def export(model: LightningModule, example: Tensor, path: Path, datamodule: LightningDataModule | None = None) -> None:
    """Export the forward pass of the model to ONNX for batches of any size, and run the file once to compare.

    The input is named `input` and the output `logits`. The metadata of the file contain `class_names` as a JSON list and a description of
    the `preprocessing`, if `datamodule` provides them.

    Raises:
        ValueError: If a required package is not installed, or if the outputs differ.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - PyTorch's exporter needs it
    except ImportError as error:
        raise ValueError(f"--onnx needs the package {error.name}: pip install 'lora-lightning[onnx]'.") from None
    model.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter's own modules
        program = torch.onnx.export(
            model,
            (example,),
            input_names=["input"],
            output_names=["logits"],
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            verbose=False,
        )
        expected = model(example[:1])
    assert program is not None
    program.model.metadata_props.update(_metadata(datamodule))
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        program.save(unfinished)
        session = onnxruntime.InferenceSession(unfinished, providers=["CPUExecutionProvider"])
        [found] = session.run(None, {session.get_inputs()[0].name: example[:1].numpy()})
        difference = float((torch.from_numpy(found) - expected).abs().max())
        if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
            raise ValueError(f"{path} is not written: its output differs from the model's by {difference:g}.")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _metadata(datamodule: LightningDataModule | None) -> dict[str, str]:
    found = {}
    if names := getattr(datamodule, "class_names", None):
        found["class_names"] = json.dumps([str(name) for name in names])
    if words := getattr(datamodule, "preprocessing_in_words", None):
        found["preprocessing"] = words()
    return found


def example_input(model: LightningModule, datamodule: LightningDataModule | None) -> Tensor:
    """Return a batch of two inputs for the forward pass of the model."""
    example: Any = model.example_input_array
    if isinstance(example, Tensor):
        return example.expand(2, *example.shape[1:]) if len(example) == 1 else example
    if datamodule is None:
        raise ValueError("--onnx needs an example input: give --data, or a model with an example_input_array.")
    datamodule.prepare_data()
    datamodule.setup("test")
    batch = datamodule.on_after_batch_transfer(next(iter(datamodule.test_dataloader())), 0)
    return torch.as_tensor(batch[0][:2])
