"""Extracts an adapter from a fully fine-tuned model."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import nn

from lora_lightning.lora.adaptation import attach
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.low_rank import low_rank_factors
from lora_lightning.lora.record import adapted_weights


def extract_adapter(base: nn.Module, tuned: nn.Module, config: LoRAConfig) -> dict[str, float]:
    """Adapt `base` such that it approximates `tuned`, a fully fine-tuned copy of it.

    Each adapter is the best approximation of the change of a weight at its rank. Changes outside the adapted weights
    (biases, other layers) are not transferred, and a warning names them.

    Args:
        base: The module before fine-tuning. It is frozen and adapted in place, as by `attach`.
        tuned: The module after fine-tuning, with the same parameters and buffers.
        config: The layers and ranks. `init`, `use_dora`, `qkv`, `qkv_sizes`, `bias`, `lora_bias` and
            `bypass` are ignored.

    Returns:
        The relative error ||ΔW - s B A|| / ||ΔW|| of each adapted layer in the Frobenius norm. It is 0 if the adapter
        is exact or the weight did not change.

    Raises:
        ValueError: If the modules differ in names or shapes, or for the reasons of `attach`.
    """
    before, after = base.state_dict(), tuned.state_dict()
    if {key: value.shape for key, value in before.items()} != {key: value.shape for key, value in after.items()}:
        differing = sorted(
            key
            for key in before.keys() | after.keys()
            if key not in before or key not in after or before[key].shape != after[key].shape
        )
        raise ValueError(
            f"base and tuned are not the same network: they differ in {differing}. Expected a model and its "
            "fine-tuned copy."
        )
    plain = replace(config, init="kaiming", use_dora=False, qkv="", qkv_sizes=[])
    attach(base, replace(plain, bias="none", lora_bias=False, bypass=None))
    left_out: dict[str, float] = {}
    adapted = adapted_weights(base)
    for found in adapted:
        (a, _), weight = found.factors, found.dense_weight()
        change = after[found.key].to(a) - weight.detach().to(a.dtype)
        matrix = found.layout.matrix(change)
        pairs = [low_rank_factors(part, found.rank) for part in (matrix if found.layout.experts else [matrix])]
        with torch.no_grad():
            best = [
                torch.stack(factors) if found.layout.experts else factors[0] for factors in zip(*pairs, strict=True)
            ]
            found.adapter.set_factors(best[0], best[1] / found.adapter.scaling)
            norm = change.norm()
            left_out[found.name] = float((change - found.adapter.delta_weight(weight)).norm() / norm) if norm else 0.0
    carried = {found.key for found in adapted}
    beyond = [key for key in before if key not in carried and not torch.equal(before[key], after[key].to(before[key]))]
    if beyond:
        warnings.warn(
            f"The adapters only represent the weights of adapted layers. These tensors also differ: {beyond}.",
            stacklevel=2,
        )
    return left_out
