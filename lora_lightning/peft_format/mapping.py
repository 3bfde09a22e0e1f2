"""Maps our configuration and state-dict keys to those of PEFT's adapter folders, and back.

The format is that of PEFT 0.21 (https://huggingface.co/docs/peft/developer_guides/checkpoint). Tensors are named
`base_model.model.<layer>.lora_A.weight` and `.lora_B.weight` (`.lora_embedding_A`, `.lora_embedding_B`, and with DoRA
`.lora_magnitude_vector`); an entry of a list `target_modules` matches the full name of a layer or a suffix of it
after a dot, and a string is a regular expression for the full name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora import AdaptedWeight, LoRAConfig, adapted_weights
from lora_lightning.lora.config import endings
from lora_lightning.lora.model import attachment_of
from lora_lightning.lora.named_adapters import exactly
from lora_lightning.lora.sharding import full
from lora_lightning.lora.state import is_adapter_key
from lora_lightning.lora.transformers_layers import LoRATransposedLinear
from lora_lightning.lora.variants import magnitude_shape
from lora_lightning.peft_format.differences import unknown_to_peft
from lora_lightning.peft_format.experts import experts_to_peft, is_experts
from lora_lightning.peft_format.model_card import base_name

PEFT_TYPE = "LORA"
OWN_TYPE = "LORA_LIGHTNING"
"""Type in `adapter_config.json` for adapters that PEFT does not know or computes incorrectly. PEFT refuses it."""
PREFIX = "base_model.model."

# Settings of other kinds of adapters, and of those with more parameters than A and B.
_UNSUPPORTED = {
    "lora_bias": "a bias in the adapter",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "megatron_config": "Megatron layers",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trainable tokens",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
}
_ONLY_DRAWS_A = ("gaussian", "orthogonal", "eva")
_SUFFIXES = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}


def describe(module: nn.Module) -> dict[str, Any]:
    """Return the configuration of the adapters for `adapter_config.json`.

    PiSSA's difference to the initial values is plain LoRA with twice the rank and the same scale.
    """
    attachment, found = attachment_of(module), adapted_weights(module)
    config, doubled = attachment.config, 2 if attachment.config.init == "pissa" else 1
    rank, alpha = (
        doubled * config.rank,
        config.alpha_of(rank=config.rank) * doubled ** (0.5 if config.use_rslora else 1),
    )
    ranks, alphas = dict[str, float](), dict[str, float]()
    for adapted in found:
        own = len(adapted.factors[0])
        factor = doubled if adapted.parameter else 1  # a bypass is never PiSSA
        ranks[adapted.name] = own * factor
        alphas[adapted.name] = config.alpha_of(*adapted.names, rank=own) * factor ** (0.5 if config.use_rslora else 1)
    description: dict[str, Any] = {
        "peft_type": PEFT_TYPE,
        "auto_mapping": None,
        "base_model_name_or_path": base_name(module),
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "target_modules": _target_modules(module, [adapted.name for adapted in found if not is_experts(adapted)]),
        "target_parameters": [adapted.name for adapted in found if is_experts(adapted)] or None,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(adapted.layer, LoRATransposedLinear) for adapted in found),
        "init_lora_weights": True,
        "modules_to_save": (attachment.saved.names if attachment.saved else None) or None,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
    }
    if config.qkv:
        description["qkv"] = config.qkv  # PEFT reports that it ignores this, and would train all rows of B
    if unknown_to_peft(module):
        description["peft_type"] = OWN_TYPE
        description["target_parameters"] = [adapted.name for adapted in found if adapted.kind.lora_is_inside]
        description["bypass"] = config.bypass
    return description


def _pattern(values: dict[str, float], default: float) -> dict[str, float]:
    """Return the values that differ from `default`, by regular expressions for the names.

    An expression also matches longer names with this suffix. Such a layer gets its own expression, and the longest ones
    come first.
    """
    names = {name for name, value in values.items() if value != default}
    names |= {name for name in values if any(ending in names for ending in endings(name))}
    return {re.escape(name) or "(?:)": values[name] for name in sorted(names, key=len, reverse=True)}


def exported(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the adapters by PEFT's keys.

    Those of PiSSA are the difference to the initial values, with twice the rank.
    """
    tensors: dict[str, Tensor] = {}
    to_peft = not unknown_to_peft(module)
    for adapted in adapted_weights(module):
        if to_peft and is_experts(adapted):
            tensors |= experts_to_peft(adapted, PREFIX)
            continue
        adapter = adapted.adapter
        parts = dict(zip(adapter.lora_names, adapter.lora_factors(), strict=True))
        if "lora_magnitude_vector" in adapter._parameters:
            parts["lora_magnitude_vector"] = adapter.lora_magnitude_vector
        for key, value in parts.items():
            suffix = ".weight" if key in ("lora_A", "lora_B") else ""
            tensors[f"{PREFIX}{_holder_name(adapted)}.{key}{suffix}".replace("..", ".")] = value
    if saved := attachment_of(module).saved:
        state = module.state_dict()
        tensors |= {f"{PREFIX}{key}": state[key] for key in saved.keys}
    return {key: full(value.detach()).cpu().contiguous().clone() for key, value in tensors.items()}


def own_key(key: str) -> str | None:
    """Return our state-dict key for a key of the format, or `None` if it does not belong to an adapter."""
    name = key.removeprefix(PREFIX)
    if name == key:
        return None
    # PEFT wraps an nn.MultiheadAttention, so that the projection inside it appears one level further in.
    name = name.replace(".base_layer.out_proj.", ".out_proj.")
    for suffix, own in _SUFFIXES.items():
        if name == suffix or name.endswith(f".{suffix}"):
            return name.removesuffix(suffix) + own
    return name if is_adapter_key(name) else None


def base_key(key: str) -> str | None:
    """Return the state-dict key of a weight of the base that PEFT saves with adapters, or `None` for other keys."""
    name = key.removeprefix(PREFIX)
    return None if name == key or is_adapter_key(key) else name.replace(".base_layer.", ".")


def check_method(description: dict[str, Any], file: Path) -> None:
    """Refuse methods other than LoRA, and LoRA with unsupported options.

    Raises:
        ValueError: If the method or an option is not supported. The message names it.
    """
    kind = description.get("peft_type")
    if kind not in (PEFT_TYPE, OWN_TYPE):
        raise ValueError(f"{file} is of peft_type {kind!r}; expected 'LORA', the only kind that can be loaded here.")
    unsupported = [f"{key} ({what})" for key, what in _UNSUPPORTED.items() if description.get(key)]
    if description.get("bias", "none") != "none":
        unsupported.append(f"bias={description['bias']!r}")
    if isinstance(init := description.get("init_lora_weights"), str) and init not in _ONLY_DRAWS_A:
        unsupported.append(f"init_lora_weights={init!r} (may have changed the base)")
    if unsupported:
        raise ValueError(f"{file} has settings that cannot be loaded: {', '.join(unsupported)}.")


def configuration(
    description: dict[str, Any], file: Path, module: nn.Module, targets: list[str], trained: list[str]
) -> LoRAConfig:
    """Return our configuration for PEFT's, with exactly the layers in the file as targets.

    Raises:
        ValueError: If it has invalid values.
    """
    by_name = description.get("target_parameters") or []
    bypass = description.get("bypass")
    layers = [name for name in targets if name not in by_name and not (bypass and not name)]
    modules = [name for name, _ in module.named_modules()]
    weights = modules + [name for name, _ in module.named_parameters(remove_duplicate=False)]
    try:
        return LoRAConfig(
            rank=description["r"],
            alpha=description["lora_alpha"],
            dropout=description.get("lora_dropout") or 0.0,
            target_modules=exactly(layers, weights) if layers else [],
            rank_pattern=description.get("rank_pattern") or {},
            alpha_pattern=description.get("alpha_pattern") or {},
            use_rslora=bool(description.get("use_rslora")),
            use_dora=bool(description.get("use_dora")),
            target_parameters=exactly(by_name, weights) if by_name else [],
            modules_to_save=exactly(trained, modules) if trained else [],
            qkv=description.get("qkv") or "",
            bypass=(bypass[0], bypass[1]) if bypass else None,
        )
    except KeyError as error:
        raise ValueError(f"{file} does not have the entry {error}; expected r and lora_alpha.") from None
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{file}: {error}") from None


def expected_shapes(adapted: AdaptedWeight, config: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of an adapter by our state-dict keys."""
    out_features, in_features = adapted.shape
    a, b = adapted.kind.lora_reshape(
        torch.empty(adapted.rank, in_features, device="meta"),
        torch.empty(out_features, adapted.rank, device="meta"),
        adapted.weight,
    )
    shapes = dict(zip(adapted.kind.lora_names, (tuple(a.shape), tuple(b.shape)), strict=True))
    if config.use_dora and adapted.parameter:
        shapes["lora_magnitude_vector"] = magnitude_shape(b)
    return {f"{_holder_name(adapted)}.{key}".lstrip("."): shape for key, shape in shapes.items()}


def _target_modules(module: nn.Module, names: list[str]) -> list[str] | str:
    """Return the full names if PEFT matches exactly these, else a regular expression that does."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.MultiheadAttention, LoRATransposedLinear)
    return exactly(names, (name for name, layer in module.named_modules() if isinstance(layer, kinds)))


def _holder_name(adapted: AdaptedWeight) -> str:
    """Return the dotted name of the module that holds A and B."""
    return (
        f"{adapted.layer_name}.lora_{adapted.parameter}".lstrip(".")
        if adapted.kind.lora_is_inside
        else adapted.layer_name
    )
