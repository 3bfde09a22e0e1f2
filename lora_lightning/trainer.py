"""`LoRATrainer`: what `lora-lightning merge` and `predict --adapter` do beside a `Trainer`'s own verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from lora_lightning.callbacks import AdapterCheckpointIO, LoRAFinetuning
from lora_lightning.checkpoints import load_base, newest_adapter, newest_checkpoint
from lora_lightning.exporting import example_input, export
from lora_lightning.lora import fingerprint, holder_of_parameters, load_adapter, merge, trained_on
from lora_lightning.report import free_path

NO_ADAPTER = "none"


class LoRATrainer(Trainer):
    """A `Trainer` that predicts with adapters from a folder, and merges them."""

    callbacks: list[Any]  # Trainer sets it from elsewhere

    @override
    def predict(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        adapter: str | None = None,
    ) -> Any:
        """Predicts: with the adapters of a checkpoint, with those of a folder, or without any.

        Args:
            model: The model; a `LoRAFinetuning` among the callbacks adapts it, unless `adapter` is given.
            dataloaders: As for `Trainer`.
            datamodule: As for `Trainer`.
            return_predictions: As for `Trainer`.
            ckpt_path: The checkpoint to predict with: a file, or a log folder, whose newest one is taken.
            weights_only: As for `Trainer`.
            adapter: A folder of adapters, as `fit` writes it and PEFT does, or a log folder, whose newest one is taken;
                `none` for the base alone. With it, `ckpt_path` means the base.

        Raises:
            FileNotFoundError: If there is no such folder or checkpoint.
            ValueError: If one does not fit the model.
        """
        arguments: dict[str, Any] = {"return_predictions": return_predictions, "weights_only": weights_only}
        if adapter is None:
            return super().predict(model, dataloaders, datamodule, ckpt_path=ckpt_path, **arguments)
        if model is None:
            raise ValueError("predict with an adapter needs the model.")
        callbacks = self.callbacks
        callback = _lora_finetuning(callbacks)
        if callback is not None:
            callback.load_base(model)
        if ckpt_path is not None:
            load_base(model, newest_checkpoint(ckpt_path))
        if adapter == NO_ADAPTER:
            rank_zero_info("Adapter: none, the base predicts.")
        else:
            folder = newest_adapter(adapter)
            adapted = holder_of_parameters(model)
            load_adapter(adapted, folder)
            rank_zero_info(f"Adapter: {folder}")
            _warn_of_another_base(adapted, folder)
        self.callbacks = [each for each in callbacks if each is not callback]
        try:
            return super().predict(model, dataloaders, datamodule, **arguments)
        finally:
            self.callbacks = callbacks

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
        callbacks = self.callbacks
        callback = _lora_finetuning(callbacks)
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
            export(model, example_input(model, datamodule), onnx)
            rank_zero_info(f"ONNX: {onnx}, of the model's forward; it agrees with PyTorch.")
        self.save_checkpoint(output, weights_only=True)
        rank_zero_info(f"Merged: {output}")


def _warn_of_another_base(adapted: nn.Module, folder: Path) -> None:
    expected, found = trained_on(folder), fingerprint(adapted)
    if expected not in (None, found):
        rank_zero_warn(
            f"The adapter in {folder} was trained on another base, or on this one in another precision: its fingerprint was "
            f"{str(expected)[:12]}, this one's is {found[:12]}. Use the configuration, seed and base_checkpoint of the training."
        )


def _lora_finetuning(callbacks: list[Any]) -> LoRAFinetuning | None:
    return next((each for each in callbacks if isinstance(each, LoRAFinetuning)), None)
