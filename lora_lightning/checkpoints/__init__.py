"""Resumes stopped runs bitwise: random states, data loaders, checkpoint files."""

from lora_lightning.checkpoints.adapter_checkpoint import NotFiniteError
from lora_lightning.checkpoints.atomic_checkpoint import AtomicCheckpointIO
from lora_lightning.checkpoints.checkpoints import (
    last_checkpoint,
    load_base,
    newest_adapter,
    newest_checkpoint,
    read_checkpoint,
)
from lora_lightning.checkpoints.loader import ResumableLoader
from lora_lightning.checkpoints.random_state import RandomState

__all__ = [
    "AtomicCheckpointIO",
    "NotFiniteError",
    "RandomState",
    "ResumableLoader",
    "last_checkpoint",
    "load_base",
    "newest_adapter",
    "newest_checkpoint",
    "read_checkpoint",
]
