"""Maps our configuration and state-dict keys to those of PEFT's adapter folders, and back.

The format is that of PEFT 0.21 (https://huggingface.co/docs/peft/developer_guides/checkpoint). Tensors are named
`base_model.model.<layer>.lora_A.weight` and `.lora_B.weight` (`.lora_embedding_A`, `.lora_embedding_B`, and with DoRA
`.lora_magnitude_vector`); an entry of a list `target_modules` matches the full name of a layer or a suffix of it
after a dot, and a string is a regular expression for the full name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora import AdaptedWeight, LoRAConfig, adapted_weights
from lora_lightning.lora.adapter import layers_of
from lora_lightning.lora.layers import ConvKind, EmbeddingKind
from lora_lightning.lora.matching import exactly, pattern_of
from lora_lightning.lora.other_layers import TransposedLinearKind
from lora_lightning.lora.record import attachment_of, config_of
from lora_lightning.lora.registry import kind_of
from lora_lightning.lora.sharding import full
from lora_lightning.lora.targets import Target
from lora_lightning.peft_format.by_name import by_name_to_peft, is_by_name
from lora_lightning.peft_format.differences import unknown_to_peft
from lora_lightning.peft_format.model_card import base_name

PEFT_TYPE = "LORA"
OWN_TYPE = "LORA_LIGHTNING"
"""Type in `adapter_config.json` for adapters that PEFT does not know or computes incorrectly. PEFT refuses it."""
PREFIX = "base_model.model."

# Settings of other kinds of adapters, and of those with more parameters than A and B.
_UNSUPPORTED = {
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
_LEAVES_THE_BASE = ("gaussian", "orthogonal", "eva", "mica")
_SUFFIXES = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_B.bias": "lora_bias",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",  # of PEFT 0.12
}


def describe(module: nn.Module, name: str) -> dict[str, Any]:
    """Return the configuration of the adapters with a name for `adapter_config.json`.

    PiSSA's difference to the initial values is plain LoRA with twice the rank and the same scale.
    """
    found, config = adapted_weights(module, name), config_of(module, name)
    saved = attachment_of(module).saved.get(name)
    doubled = 2 if config.init == "pissa" else 1
    rank, alpha = doubled * config.rank, config.alpha_of() * doubled ** (0.5 if config.use_rslora else 1)
    ranks, alphas = dict[str, float](), dict[str, float]()
    for adapted in found:
        factor = doubled if adapted.parameter else 1  # a bypass is never PiSSA
        ranks[adapted.name] = adapted.rank * factor
        alphas[adapted.name] = _alpha(adapted, config) * factor ** (0.5 if config.use_rslora else 1)
    of_convolutions = any(isinstance(adapted.kind, ConvKind) for adapted in found)  # which MiCA of PEFT refuses
    description: dict[str, Any] = {
        "peft_type": PEFT_TYPE,
        "auto_mapping": None,
        "base_model_name_or_path": base_name(module),
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "target_modules": _target_modules(module, [adapted.name for adapted in found if not is_by_name(adapted)]),
        "target_parameters": [adapted.name for adapted in found if is_by_name(adapted)] or None,
        "bias": config.bias,
        "lora_bias": config.lora_bias,
        "fan_in_fan_out": any(isinstance(adapted.kind, TransposedLinearKind) for adapted in found),
        "init_lora_weights": "mica" if config.init == "mica" and not of_convolutions else True,
        "modules_to_save": (saved.names if saved else None) or None,
        "rank_pattern": pattern_of(ranks, rank),
        "alpha_pattern": pattern_of(alphas, alpha),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
    }
    if config.qkv:
        description["qkv"] = config.qkv  # PEFT reports that it ignores this, and would train all rows of B
    if config.qkv_sizes:
        description["qkv_sizes"] = config.qkv_sizes
    if unknown_to_peft(module, name):
        description["peft_type"] = OWN_TYPE
        description["target_parameters"] = [adapted.name for adapted in found if adapted.kind.is_reader]
        description["bypass"] = config.bypass
    return description


def _alpha(adapted: AdaptedWeight, config: LoRAConfig) -> float:
    """Return the alpha for the scale of an adapter at its own rank, which may be lower than the requested one."""
    if adapted.rank == config.rank_of(*adapted.names):
        return config.alpha_of(*adapted.names)
    return adapted.adapter.scaling * (adapted.rank**0.5 if config.use_rslora else adapted.rank)


def exported(module: nn.Module, name: str, to_peft: bool) -> dict[str, Tensor]:
    """Return the tensors of the adapters with a name by PEFT's keys.

    Those of PiSSA are the difference to the initial values, with twice the rank.

    Args:
        module: An adapted module.
        name: Name of the adapters.
        to_peft: Whether PEFT can read the folder.
    """
    tensors: dict[str, Tensor] = {}
    for adapted in adapted_weights(module, name):
        if to_peft and is_by_name(adapted):
            tensors |= by_name_to_peft(adapted, PREFIX)
            continue
        a, b = adapted.adapter.factors()
        if adapted.layout.experts:
            a, b = a.transpose(0, 1), b.permute(1, 2, 0)
        parts = {"lora_A": a, "lora_B": b}
        if "lora_magnitude_vector" in adapted.adapter._parameters:
            parts["lora_magnitude_vector"] = adapted.adapter.get_parameter("lora_magnitude_vector")
        if adapted.adapter.lora_bias is not None:
            parts["lora_bias"] = adapted.adapter.lora_bias
        for parameter, value in parts.items():
            leaf = leaves_of(adapted)[parameter]
            suffix = ".weight" if leaf in ("lora_A", "lora_B") else ""
            tensors[f"{PREFIX}{_holder_name(adapted)}.{leaf}{suffix}".replace("..", ".")] = to_file(
                adapted, parameter, value
            )
    saved = attachment_of(module).saved.get(name)
    if saved is not None:
        wrapped = {f"{adapted.layer_name}.bias".lstrip(".") for adapted in adapted_weights(module, name)}
        for key, value in saved.trained_values().items():
            inside = f"{key.removesuffix('bias')}base_layer.bias" if key in wrapped and key in saved.biases else key
            tensors[f"{PREFIX}{inside}"] = value
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
    return name if _is_of_adapter(name) else None


def base_key(key: str) -> str | None:
    """Return the state-dict key of a weight of the base that PEFT saves with adapters, or `None` for other keys."""
    name = key.removeprefix(PREFIX)
    return None if name == key or _is_of_adapter(key) else name.replace(".base_layer.", ".")


def check_method(description: dict[str, Any], file: Path) -> None:
    """Refuse methods other than LoRA, and LoRA with unsupported options.

    Raises:
        ValueError: If the method or an option is not supported. The message names it.
    """
    kind = description.get("peft_type")
    if kind not in (PEFT_TYPE, OWN_TYPE):
        raise ValueError(f"{file} is of peft_type {kind!r}; expected 'LORA', the only kind that can be loaded here.")
    unsupported = [f"{key} ({what})" for key, what in _UNSUPPORTED.items() if description.get(key)]
    if isinstance(init := description.get("init_lora_weights"), str) and init not in _LEAVES_THE_BASE:
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
    modules = [name for name, _ in layers_of(module)]
    weights = modules + [f"{name}.{key}".lstrip(".") for name, layer in layers_of(module) for key in layer._parameters]
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
            qkv_sizes=description.get("qkv_sizes") or [],
            init="mica" if description.get("init_lora_weights") == "mica" else "kaiming",
            bias=description.get("bias") or "none",
            lora_bias=bool(description.get("lora_bias")),
            bypass=(bypass[0], bypass[1]) if bypass else None,
        )
    except KeyError as error:
        raise ValueError(f"{file} does not have the entry {error}; expected r and lora_alpha.") from None
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{file}: {error}") from None


def expected_shapes(target: Target, config: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of an adapter in a folder, by their keys."""
    rows, columns = target.shape
    experts = target.outline().shape[:1] if target.layout.experts else ()
    shapes: dict[str, tuple[int, ...]] = {
        "lora_A": (target.rank, *experts, columns),
        "lora_B": (rows, target.rank, *experts),
    }
    if config.use_dora and target.parameter:
        shapes["lora_magnitude_vector"] = (rows,)
    if config.lora_bias:
        shapes["lora_bias"] = (rows,)
    empty = {parameter: torch.empty(shape, device="meta") for parameter, shape in shapes.items()}
    return {
        key_in_folder(target, parameter): tuple(to_file(target, parameter, value).shape)
        for parameter, value in empty.items()
    }


def leaves_of(target: Target) -> dict[str, str]:
    """Return the names in a folder of the parameters of an adapter."""
    kind = "embedding_" if isinstance(target.kind, EmbeddingKind) else ""
    return {
        "lora_A": f"lora_{kind}A",
        "lora_B": f"lora_{kind}B",
        "lora_magnitude_vector": "lora_magnitude_vector",
        "lora_bias": "lora_B.bias",
    }


def key_in_folder(target: Target, parameter: str) -> str:
    """Return the key of a parameter of an adapter in a folder, without PEFT's prefix and suffix."""
    leaf = "lora_bias" if parameter == "lora_bias" else leaves_of(target)[parameter]
    return f"{_holder_name(target)}.{leaf}".lstrip(".")


def to_file(target: Target, parameter: str, value: Tensor) -> Tensor:
    """Return a parameter of an adapter in the shape that it has in a folder."""
    if not isinstance(target.kind, ConvKind) or parameter == "lora_bias":
        return value
    ones = [1] * (target.outline().dim() - 2)
    if parameter == "lora_A":
        return value.view(-1, *target.outline().shape[1:])
    return value.view(*value.shape, *ones) if parameter == "lora_B" else value.view(1, -1, *ones)


def from_file(target: Target, parameter: str, value: Tensor) -> Tensor:
    """Return a tensor of a folder in the shape of the parameter of an adapter."""
    if not isinstance(target.kind, ConvKind) or parameter == "lora_bias":
        return value
    return value.flatten() if parameter == "lora_magnitude_vector" else value.flatten(1)


def _target_modules(module: nn.Module, names: list[str]) -> list[str] | str:
    """Return the full names if PEFT matches exactly these, else a regular expression that does."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.MultiheadAttention)
    return exactly(
        names,
        (
            name
            for name, layer in layers_of(module)
            if isinstance(layer, kinds) or isinstance(kind_of(layer), TransposedLinearKind)
        ),
    )


def _holder_name(target: Target) -> str:
    """Return the dotted name in a folder of what holds A and B."""
    return f"{target.layer_name}.lora_{target.parameter}".lstrip(".") if target.kind.is_reader else target.layer_name


def _is_of_adapter(key: str) -> bool:
    """Return whether a key of a folder belongs to an adapter."""
    return key.rpartition(".")[2].startswith("lora_")
