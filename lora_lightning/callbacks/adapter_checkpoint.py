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
from lora_lightning.lora import LowRankUpdate, adapted_layers, attachment, is_adapter_key, whole_keys


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
            "adapters": self._adapters(),
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
        self._refuse_other_adapters(path, description)
        if description["base_fingerprint"] != self.base_fingerprint:
            raise ValueError(
                f"{path} holds adapters of another base: trained on {description['base_path']} (fingerprint "
                f"{description['base_fingerprint'][:12]}), but the model's base is {self.base_path} "
                f"({self.base_fingerprint[:12]}). Set LoRAFinetuning's base_checkpoint to the first."
            )
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
        whole = whole_keys(self.pl_module)
        frozen = {
            name
            for name, parameter in self.pl_module.named_parameters(remove_duplicate=False)
            if not parameter.requires_grad and not is_adapter_key(name)
        }
        buffers = {name for name, _ in self.adapted.named_buffers(prefix=prefix, remove_duplicate=False)}
        return (frozen | buffers) - whole - {key for key in buffers if is_adapter_key(key)}

    def _adapters(self) -> dict[str, str]:
        """What each adapter is, by the name of what it adapts: `rank 1, scale 1`; and the modules trained whole."""
        described = {name: _describe(update) for name, update in adapted_layers(self.pl_module).items()}
        whole = {key.rpartition(".")[0] for key in whole_keys(self.pl_module)}
        return described | dict.fromkeys(sorted(whole), "trained whole")

    def _refuse_other_adapters(self, path: str | Path, description: dict[str, Any]) -> None:
        saved, attached = description["adapters"], self._adapters()
        if saved != attached:
            raise ValueError(
                f"{path} holds other adapters than the model has. In the checkpoint: {_summary(saved)}; attached: "
                f"{_summary(attached)}. Give LoRAFinetuning the rank, alpha, targets and variant of the checkpoint."
            )


def _describe(update: LowRankUpdate) -> str:
    variants = (", PiSSA" if "lora_A_initial" in update._buffers else "") + (
        ", DoRA" if "lora_magnitude_vector" in update._parameters else ""
    )
    return f"rank {update.lora_rank}, scale {update.lora_scaling:g}{variants}"


def _summary(adapters: dict[str, str]) -> str:
    """`linear1 (rank 1, scale 1), ...`."""
    return ", ".join(f"{name} ({what})" for name, what in adapters.items())
