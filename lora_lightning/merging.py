"""`lora-lightning merge`: a plain model out of a base and its adapters."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lora_lightning.callbacks import AdapterCheckpointIO, LoRAFinetuning
from lora_lightning.lora import merge
from lora_lightning.report import free_path

_TOLERANCE = 1e-4


class LoRATrainer(Trainer):
    """A `Trainer` that can merge."""

    def merge(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        output: Path | None = None,
        onnx: Path | None = None,
    ) -> None:
        """Folds trained adapters into their base, and writes a plain checkpoint.

        Args:
            model: The model as it was trained.
            datamodule: Where the example comes from with which an ONNX file is made and checked.
            ckpt_path: The checkpoint that holds the adapters: a file, or a log folder, whose newest one is taken.
            output: The plain checkpoint to write, a `base_checkpoint` or `ckpt_path` like that of a pretraining; by default
                `merged.ckpt`, or where that exists the first of `merged-v1.ckpt`, ... that does not.
            onnx: An ONNX file to write beside it.

        Raises:
            ValueError: If there is nothing to merge, or the ONNX file does not agree with the model.
            FileExistsError: If a file to write is there already.
        """
        callbacks = self.callbacks  # type: ignore[attr-defined] # Trainer sets it from elsewhere
        callback = next((each for each in callbacks if isinstance(each, LoRAFinetuning)), None)
        if callback is None or ckpt_path is None:
            missing = (
                "--ckpt_path, a checkpoint with adapters" if callback else "a LoRAFinetuning among trainer.callbacks"
            )
            raise ValueError(f"merge needs {missing}. Give it the configuration that the adapters were trained with.")
        if output is None:
            output = free_path(Path("merged.ckpt"))
        for path in (output, onnx):
            if path is not None and Path(path).exists():
                raise FileExistsError(f"{path} exists: it is not overwritten. Choose another name, or remove it.")
        self.strategy.connect(model)
        callback.setup(self, model, "merge")
        files = self.strategy.checkpoint_io
        assert isinstance(files, AdapterCheckpointIO)
        assert callback.adapted is not None
        model.load_state_dict(files.load_checkpoint(ckpt_path)["state_dict"])
        merge(callback.adapted)
        self.strategy.checkpoint_io = files.checkpoint_io
        if onnx is not None:
            export(model, _example(model, datamodule), onnx)
            rank_zero_info(f"ONNX: {onnx}, of the model's forward; it agrees with PyTorch.")
        self.save_checkpoint(output, weights_only=True)
        rank_zero_info(f"Merged: {output}")


def export(model: LightningModule, example: Tensor, path: Path) -> None:
    """Writes the model's forward as ONNX, for batches of any size, and runs the file once to compare.

    Raises:
        ValueError: If what it needs is not installed, or the outputs differ.
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
            model, (example,), dynamo=True, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), verbose=False
        )
        expected = model(example[:1])
    assert program is not None
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


def _example(model: LightningModule, datamodule: LightningDataModule | None) -> Tensor:
    """Two inputs as the model's forward takes them."""
    example: Any = model.example_input_array
    if isinstance(example, Tensor):
        return example.expand(2, *example.shape[1:]) if len(example) == 1 else example
    if datamodule is None:
        raise ValueError("--onnx needs an example input: give --data, or a model with an example_input_array.")
    datamodule.prepare_data()
    datamodule.setup("test")
    batch = datamodule.on_after_batch_transfer(next(iter(datamodule.test_dataloader())), 0)
    return torch.as_tensor(batch[0][:2])
