"""Passes adapters from the processes that trained them to later ones."""

from __future__ import annotations

import os
import tempfile
import uuid
import weakref
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lora_lightning.lightning_packages import is_a
from lora_lightning.lora import LoRAConfig, adapter_state_dict
from lora_lightning.lora.record import config_of


class SpawnedAdapters:
    """Passes the trained adapters from `fit` to a later `test` or `predict` of the same trainer.

    With `ddp_spawn`, `ddp_fork` and `ddp_notebook`, each of these runs in separate processes. Lightning returns the
    weights to the main process, but the model there has no adapters. The adapters are therefore kept in a temporary
    file, whose name all processes know, as long as the callback exists in the main process.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.gettempdir()) / f"lora_lightning-{uuid.uuid4().hex}.pt"
        weakref.finalize(self, _remove, self.path, os.getpid())

    def save(self, trainer: Trainer, adapted: nn.Module, folder: object) -> None:
        """Write the adapters to the temporary file, at the end of `fit` in separate processes."""
        if not is_a(trainer.strategy.launcher, _MultiProcessingLauncher) or not trainer.is_global_zero:
            return
        state = {key: value.detach().cpu() for key, value in adapter_state_dict(adapted).items()}
        torch.save({"config": asdict(config_of(adapted)), "state": state}, self.path)
        rank_zero_info(
            "The adapters were trained in separate processes. The model in the main process has none, but test, "
            "predict and validate of this trainer use them. "
            f"load_adapter(model, {str(folder)!r}) attaches them in the main process."
        )

    def load(self, adapted: nn.Module) -> None:
        """Read the adapters from the temporary file, if there is one, into adapters that were just attached."""
        if self.path.exists():
            state = adapted.state_dict(keep_vars=True)
            with torch.no_grad():
                for key, value in torch.load(self.path, weights_only=True)["state"].items():
                    state[key].copy_(value)

    def config(self) -> LoRAConfig | None:
        """Return the configuration of the trained adapters, if there are any."""
        return LoRAConfig(**torch.load(self.path, weights_only=True)["config"]) if self.path.exists() else None

    def __getstate__(self) -> dict[str, Path]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.path = state["path"]


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:
        with suppress(OSError):
            path.unlink(missing_ok=True)
