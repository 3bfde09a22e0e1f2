"""Checks whether the adapters in a folder belong to the base that they are loaded onto."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_lightning.lora import base_fingerprint
from lora_lightning.lora.fingerprint import BaseDigests, fingerprint_and_sample, is_in_another_precision

_BASE, _SAMPLE = "lora_lightning_base_sha256", "lora_lightning_base_sample"


def base_metadata(module: nn.Module, known: BaseDigests | None = None) -> dict[str, str]:
    """Return the metadata that identify the base in an adapter folder, from its digests if they are known."""
    if known is not None:
        return {_BASE: known.fingerprint, _SAMPLE: known.sample}
    digest, sample = fingerprint_and_sample(module)
    return {_BASE: digest, _SAMPLE: sample}


def base_of(metadata: Mapping[str, str]) -> str | None:
    """Return the fingerprint of the base, or `None` if another program wrote the folder."""
    return metadata.get(_BASE)


def check_base(
    module: nn.Module,
    folder: Path,
    metadata: Mapping[str, str],
    saved: Mapping[str, Tensor],
    adapter_keys: Container[str],
    strict: bool,
) -> str | None:
    """Return a warning if the adapters in `folder` were trained on another base.

    The same base in another precision has a warning of its own.

    Args:
        module: The base, plain or adapted.
        folder: The folder, for the message.
        metadata: Metadata of the file with the adapters.
        saved: Weights of the base in the folder by state-dict key. PEFT saves those of adapted embeddings.
        adapter_keys: State-dict keys of the adapters, which are not part of the base.
        strict: Whether to refuse another base. The same base in another precision, or quantized, is never refused.

    Raises:
        ValueError: If `strict` is set and the base is a different one.
    """
    difference = _difference(module, metadata, saved, adapter_keys)
    if difference is None:
        return None
    if difference == "precision":
        return (
            f"The adapter in {folder} was trained on this base in another precision: its outputs differ by the "
            "rounding of the weights of the base."
        )
    message = (
        f"The adapter in {folder} was trained on another base: {difference}. Its outputs will differ from those in "
        "training. Use the configuration, seed and base checkpoint of the training."
    )
    if strict:
        raise ValueError(message)
    return message


def _difference(
    module: nn.Module, metadata: Mapping[str, str], saved: Mapping[str, Tensor], adapter_keys: Container[str]
) -> str | None:
    state = module.state_dict() if saved else {}
    for key, value in saved.items():
        own = state[key]
        if own.shape != value.shape:
            return f"its {key} has the shape {tuple(value.shape)}, that of this base {tuple(own.shape)}"
        # They have to be equal in the lower of both precisions.
        dtype = own.dtype if own.itemsize <= value.itemsize else value.dtype
        if own.is_floating_point() and not torch.equal(own.detach().cpu().to(dtype), value.to(dtype)):
            return f"{key} in the folder differs from that of this base"
    expected = metadata.get(_BASE)
    if expected is None:
        return None
    found = base_fingerprint(module, adapter_keys)
    if found == expected:
        return None
    sample = metadata.get(_SAMPLE)
    if sample is not None and is_in_another_precision(module, sample, adapter_keys):
        return "precision"
    return f"its fingerprint is {expected[:12]}, that of this base {found[:12]}"
