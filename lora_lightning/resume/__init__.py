"""Resumes stopped runs bitwise: random states, data loaders, checkpoint files."""

from lora_lightning.resume.adapter_checkpoint import AdapterCheckpointIO, NotFiniteError
from lora_lightning.resume.atomic_checkpoint import AtomicCheckpointIO
from lora_lightning.resume.loader import ResumableLoader
from lora_lightning.resume.random_state import RandomState

__all__ = ["AdapterCheckpointIO", "AtomicCheckpointIO", "NotFiniteError", "RandomState", "ResumableLoader"]
