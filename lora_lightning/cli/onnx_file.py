"""Writes a model to an ONNX file."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.export import Dim

from lora_lightning.evaluation import described, find_targets, tensors_of
from lora_lightning.report.files import refuse_to_overwrite

_TOLERANCE = 1e-4

Inputs = Tensor | Mapping[str, Tensor]


def require_onnx() -> None:
    """Raise an error before a model is loaded if a package for ONNX is not installed.

    Raises:
        ValueError: If `onnxruntime`, or `onnxscript`, which PyTorch's exporter uses, is missing.
    """
    for name in ("onnxruntime", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise ValueError(f"ONNX needs the package {name}: pip install 'lora-lightning[onnx]'.") from None


def write_onnx(model: LightningModule, example: Inputs, path: Path, datamodule: LightningDataModule | None) -> None:
    """Write the forward pass of the model to an ONNX file for batches of any size, and run the file once to compare.

    A tensor becomes the input `input`, and a mapping, as from `TextDataModule`, one input per key, with texts of any
    length. If `forward` has parameters with the names of the keys, they are passed as keyword arguments. The output
    `logits` is the first tensor that `forward` returns, or the one with this name. The metadata of the file contain
    `class_names` as a JSON list and a description of the `preprocessing`, if `datamodule` provides them.

    Args:
        model: The model. It is in evaluation mode afterwards.
        example: The input of `forward`, with at least two samples.
        path: The file.
        datamodule: Provides the metadata.

    Raises:
        ValueError: If `forward` fails or returns no tensor, or if the outputs differ. No file is then written.
        FileExistsError: If a file already exists.
    """
    import onnxruntime  # it is optional

    named = {"input": example} if isinstance(example, Tensor) else dict(example)
    keywords = isinstance(example, Mapping) and not signature(model.forward).parameters.keys().isdisjoint(example)
    wrapped = _Logits(model, keywords).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # raised by the modules of the exporter
        try:
            expected = wrapped(example)
        except Exception as error:
            raise ValueError(
                f"forward of {type(model).__name__} fails for the input {described(example)}: {type(error).__name__}: "
                f"{error}. Set example_input_array of the model to an input of forward."
            ) from error
        if expected is None:
            raise ValueError(
                f"forward of {type(model).__name__} returned no tensor; expected logits: a tensor, or a mapping or "
                "sequence with one."
            )
        program = torch.onnx.export(
            wrapped,
            (example, {}),  # a mapping as the last argument would be keyword arguments
            input_names=list(named),
            output_names=["logits"],
            dynamo=True,
            dynamic_shapes=(_dynamic(example),),
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(_metadata(datamodule))
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".onnx-", dir=path.parent) as folder:
        written = Path(folder) / path.name
        program.save(written)
        session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
        [found] = session.run(None, {entry.name: named[entry.name].numpy() for entry in session.get_inputs()})
        difference = float((torch.from_numpy(found) - expected).abs().max())
        if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
            raise ValueError(f"{path} is not written: its output differs from the model's by {difference:g}.")
        # More than 2 GB of weights are in a separate file, which has to be there first.
        for file in sorted(written.parent.iterdir(), key=written.__eq__):
            refuse_to_overwrite(path.with_name(file.name))
            file.replace(path.with_name(file.name))
    rank_zero_info(f"ONNX: {path}, of the forward pass of the model; its outputs agree with PyTorch.")


class _Logits(nn.Module):
    """Returns the logits of a model for a tensor, or for a mapping of tensors, which may be keyword arguments."""

    def __init__(self, model: nn.Module, by_keyword: bool) -> None:
        super().__init__()
        self.model = model
        self.by_keyword = by_keyword

    def forward(self, inputs: Any) -> Tensor | None:
        output = self.model(**inputs) if self.by_keyword else self.model(inputs)
        return next(tensors_of(output), None)


def example_input(trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None) -> Inputs:
    """Return two samples as an input of the forward pass: the model's `example_input_array`, or from the test data."""
    example: Any = model.example_input_array
    if isinstance(example, Tensor):
        return example.expand(2, *example.shape[1:]) if len(example) == 1 else example
    if isinstance(example, Mapping):
        return example
    if datamodule is None:
        raise ValueError("ONNX needs an example input: give --data, or a model with an example_input_array.")
    trainer.strategy.connect(model)
    datamodule.trainer = trainer  # to get the tokenizer of the model
    datamodule.prepare_data()
    datamodule.setup("test")
    loaders = datamodule.test_dataloader()
    loader = loaders[0] if isinstance(loaders, list | tuple) else loaders
    batch = datamodule.on_after_batch_transfer(next(iter(loader)), 0)
    inputs = batch[0] if isinstance(batch, tuple | list) else batch
    if isinstance(inputs, Mapping):
        targets = find_targets(batch)
        tensors = {
            key: value[:2] for key, value in inputs.items() if isinstance(value, Tensor) and value is not targets
        }
        return _accepted(model, tensors)
    return torch.as_tensor(inputs[:2])


def _accepted(model: LightningModule, inputs: dict[str, Tensor]) -> Inputs:
    """Return the part of a batch that `forward` takes: what its parameters name, the only tensor, or else the mapping.

    `forward(x)` for a batch with one input gets this input if it does not take the mapping.
    """
    parameters = signature(model.forward).parameters.values()
    named = {each.name for each in parameters}
    if named & inputs.keys():
        takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
        return inputs if takes_all else {key: value for key, value in inputs.items() if key in named}
    if len(inputs) == 1:
        [only] = inputs.values()
        try:
            with torch.no_grad():
                model(inputs)
        except Exception:  # noqa: BLE001 - any error says that forward does not take a mapping
            return only
    return inputs


def _dynamic(example: Inputs) -> Any:
    """Return the dimensions of any size: the batch, and for a mapping the second one where the model allows it."""
    if isinstance(example, Tensor):
        return {0: "batch"}
    return {key: {0: "batch"} | ({1: Dim.AUTO} if value.dim() > 1 else {}) for key, value in example.items()}


def _metadata(datamodule: LightningDataModule | None) -> dict[str, str]:
    found = {}
    if names := getattr(datamodule, "class_names", None):
        found["class_names"] = json.dumps([str(name) for name in names])
    if words := getattr(datamodule, "preprocessing_in_words", None):
        found["preprocessing"] = words()
    return found
