"""Checkpoints of adapters alone, through Lightning's own machinery."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule
from torch import nn
from typing_extensions import override

from lora_lightning.checkpoints import ADAPTER_KEY
from lora_lightning.lora import adapted_layers, attachment, is_adapter_key


class AdapterCheckpointIO(CheckpointIO):
    """Leaves the frozen base out of the checkpoints that are saved, and fills it in from the model when loading.

    Every route of Lightning goes through it: `ModelCheckpoint` in all modes, `save_weights_only`,
    `Trainer.save_checkpoint`, `ckpt_path` in `fit`, `validate`, `test` and `predict`, strict loading included.

    A saved checkpoint has an entry `lora_lightning` with the adapters' configuration and scales, the SHA-256
    fingerprint of the base, and the base's path as a hint. A checkpoint made on another base, or with other
    adapters, is refused.

    Args:
        checkpoint_io: What reads and writes the files.
        pl_module: The model, adapted.
        adapted: The part of it that `attach` was called with.
        base_fingerprint: `fingerprint` of that part.
        base_path: Where the base came from, if from a file.
    """

    def __init__(
        self,
        checkpoint_io: CheckpointIO,
        pl_module: LightningModule,
        adapted: nn.Module,
        base_fingerprint: str,
        base_path: str | None,
    ) -> None:
        super().__init__()
        self.checkpoint_io = checkpoint_io
        self.pl_module = pl_module
        self.adapted = adapted
        self.base_fingerprint = base_fingerprint
        self.base_path = base_path

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        base_keys = self._base_keys()
        kept = {key: value for key, value in checkpoint["state_dict"].items() if key not in base_keys}
        description = {
            "config": asdict(attachment(self.adapted).config),
            "scaling": self._scaling(),
            "base_fingerprint": self.base_fingerprint,
            "base_path": self.base_path,
        }
        content = {**checkpoint, "state_dict": kept, ADAPTER_KEY: description}
        self.checkpoint_io.save_checkpoint(content, path, storage_options)

    @override
    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(path, *args, **kwargs)
        description = checkpoint.get(ADAPTER_KEY)
        if description is None:
            raise ValueError(
                f"{path} is a full checkpoint; with LoRAFinetuning, ckpt_path takes one that holds adapters. Give this "
                "one as LoRAFinetuning's base_checkpoint."
            )
        if description["base_fingerprint"] != self.base_fingerprint:
            raise ValueError(
                f"{path} holds adapters of another base: trained on {description['base_path']} (fingerprint "
                f"{description['base_fingerprint'][:12]}), but the model's base is {self.base_path} "
                f"({self.base_fingerprint[:12]}). Set LoRAFinetuning's base_checkpoint to the first."
            )
        self._refuse_other_adapters(path, checkpoint["state_dict"], description)
        live = self.pl_module.state_dict()
        base = {key: live[key] for key in self._base_keys() if key in live}
        checkpoint["state_dict"] = {**base, **checkpoint["state_dict"]}
        return checkpoint

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        self.checkpoint_io.remove_checkpoint(path)

    @override
    def teardown(self) -> None:
        self.checkpoint_io.teardown()

    def _base_keys(self) -> set[str]:
        """Names of the frozen base's parameters and buffers, which do not belong into a checkpoint.

        Parameters that still train do belong there, and so do buffers outside the adapted part, which may change.
        """
        prefix = next(name for name, module in self.pl_module.named_modules() if module is self.adapted)
        frozen = {
            name
            for name, parameter in self.pl_module.named_parameters(remove_duplicate=False)
            if not parameter.requires_grad and not is_adapter_key(name)
        }
        buffers = {name for name, _ in self.adapted.named_buffers(prefix=prefix, remove_duplicate=False)}
        return frozen | buffers

    def _scaling(self) -> dict[str, float]:
        return {name: layer.lora_scaling for name, layer in adapted_layers(self.pl_module).items()}

    def _refuse_other_adapters(self, path: str | Path, state: dict[str, Any], description: dict[str, Any]) -> None:
        saved = {key: tuple(value.shape) for key, value in state.items() if is_adapter_key(key)}
        attached = {
            key: tuple(value.shape) for key, value in self.pl_module.state_dict().items() if is_adapter_key(key)
        }
        if saved == attached and description["scaling"] == self._scaling():
            return
        raise ValueError(
            f"{path} holds other adapters than the model has. In the checkpoint: {_summary(saved, description)}; "
            f"attached: {_summary(attached, {'scaling': self._scaling()})}. Give LoRAFinetuning the rank, alpha and "
            "targets of the checkpoint."
        )


def _summary(shapes: dict[str, tuple[int, ...]], description: dict[str, Any]) -> str:
    """Layers with their rank and scale: `linear1 (rank 1, scale 1)`."""
    ranks = {key.removesuffix(".lora_A"): shape[0] for key, shape in shapes.items() if key.endswith(".lora_A")}
    return ", ".join(f"{name} (rank {rank}, scale {description['scaling'][name]:g})" for name, rank in ranks.items())
