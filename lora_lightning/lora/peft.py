"""An adapter folder on disk, in the format of the PEFT library: `adapter_config.json` and `adapter_model.safetensors`.

The format, as PEFT 0.21 reads and writes it (https://huggingface.co/docs/peft/developer_guides/checkpoint): tensors are
called `base_model.model.<layer>.lora_A.weight` and `.lora_B.weight`; a list entry of `target_modules` matches a layer's
whole name or the end of it after a dot, a string is a regular expression for the whole name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_lightning.lora.adapter import (
    adapted_layers,
    adapter_parameters,
    adapter_state,
    attach,
    is_adapted,
)
from lora_lightning.lora.attached import attachment
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.selection import SIDE_PATHS as ADAPTED

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What another kind of adapter, or one with more parts than A and B, says in its configuration.
_UNSUPPORTED = {
    "use_dora": "DoRA magnitudes",
    "modules_to_save": "modules trained whole",
    "fan_in_fan_out": "transposed weights",
    "lora_bias": "a bias in the adapter",
    "target_parameters": "parameters adapted by name",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "megatron_config": "Megatron layers",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trainable tokens",
}


def save_adapter(module: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes the adapters of `module` to `folder`, in PEFT's format.

    Args:
        module: A module that `attach` was called with. Layer names in the files are relative to it.
        folder: Made if missing.

    Raises:
        ValueError: If `module` is not adapted.
        FileExistsError: If the folder holds an adapter already.
    """
    config, folder = attachment(module).config, Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if (folder / name).exists():
            raise FileExistsError(
                f"{folder / name} exists: it is not overwritten. Choose another folder, or remove the adapter there."
            )
    names = list(adapted_layers(module))
    description = {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.rank if config.alpha is None else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": _target_modules(module, names),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": _alpha_pattern(config, names),
        "use_rslora": config.rslora,
        "use_dora": False,
    }
    tensors = {f"{_PREFIX}{key}.weight": value.cpu().contiguous() for key, value in adapter_state(module).items()}
    folder.mkdir(parents=True, exist_ok=True)
    # Each file appears whole or not at all; the configuration, without which the folder is no adapter, comes last.
    unfinished = folder / f".{WEIGHTS_NAME}.unfinished"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.replace(folder / WEIGHTS_NAME)
    unfinished = folder / f".{CONFIG_NAME}.unfinished"
    unfinished.write_text(json.dumps(description, indent=2) + "\n")
    unfinished.replace(folder / CONFIG_NAME)


def load_adapter(module: nn.Module, folder: str | os.PathLike[str]) -> list[str]:
    """Loads the adapters in `folder`, written by `save_adapter` or by PEFT; attaches them if `module` has none.

    Args:
        module: The base, plain or adapted with the same layers, ranks and scales.
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The names of the adapted layers.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If a file is damaged, holds another kind of adapter, or does not fit `module`; `module` is then
            unchanged.
    """
    folder = Path(folder)
    description = _read_description(folder / CONFIG_NAME)
    tensors = _read_tensors(folder / WEIGHTS_NAME)
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    names = list(dict.fromkeys(key.rpartition(".")[0] for key in tensors))
    config = _config(description, folder / CONFIG_NAME, names)
    expected = {
        f"{name}.{key}".lstrip("."): shape
        for name in names
        for key, shape in _expected_shapes(module, name, config, folder).items()
    }
    if shapes != expected:
        wrong = sorted(key for key in shapes.keys() | expected.keys() if shapes.get(key) != expected.get(key))
        listed = "; ".join(
            f"{key} is {shapes.get(key, 'missing')}, expected {expected.get(key, 'none')}" for key in wrong
        )
        raise ValueError(f"The adapter in {folder} does not fit this {type(module).__name__}: {listed}.")
    if is_adapted(module):
        _refuse_other_adapters(module, names, config, folder)
    else:
        attach(module, config)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for key, value in tensors.items():
            parameters[key].copy_(value)
    assert len(tensors) == len(adapter_parameters(module))
    return names


def _target_modules(module: nn.Module, names: list[str]) -> list[str] | str:
    """The full names where a list of them is exact for PEFT, else an expression that is."""
    supported = [name for name, layer in module.named_modules() if isinstance(layer, tuple(ADAPTED))]
    caught = {name for name in supported if any(name == n or name.endswith(f".{n}") for n in names)}
    return names if caught == set(names) else _exactly(names)


def _exactly(names: Iterable[str]) -> str:
    # A module that is itself the adapted layer has the empty name; "(?:)" matches that and nothing else.
    return "|".join(re.escape(name) for name in names) or "(?:)"


def _alpha_pattern(config: LoRAConfig, names: list[str]) -> dict[str, float]:
    """PEFT's alpha does not follow the rank: where ours did, the alpha is written out."""
    if config.alpha is not None:
        return config.alpha_pattern
    default = config.rank
    return {re.escape(name): config.alpha_of(name) for name in names if config.alpha_of(name) != default}


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, as save_adapter and PEFT "
            "write it."
        )
    try:
        description = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable as JSON ({error}). Write the adapter again.") from None
    if not isinstance(description, dict):
        raise ValueError(f"{path} holds a {type(description).__name__}; expected an adapter's configuration.")
    return description


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of the file by our own keys: `<layer>.lora_A`, `<layer>.lora_B`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Expected the adapter's weights beside its {CONFIG_NAME}.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}). Write the adapter again.") from None
    foreign = [key for key in tensors if not re.fullmatch(rf"{re.escape(_PREFIX)}(.+\.)?lora_[AB]\.weight", key)]
    if foreign or not tensors:
        found = f"holds {', '.join(foreign[:5])}" if foreign else "is empty"
        raise ValueError(f"{path} {found}; expected keys like '{_PREFIX}<layer>.lora_A.weight' alone.")
    return {key.removeprefix(_PREFIX).removesuffix(".weight"): value for key, value in tensors.items()}


def _config(description: dict[str, Any], path: Path, names: list[str]) -> LoRAConfig:
    """Our configuration for PEFT's, with targets that are exactly the layers in the file."""
    kind = description.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path} is of peft_type {kind!r}; expected 'LORA', the only kind that can be loaded here.")
    unsupported = [f"{key} ({what})" for key, what in _UNSUPPORTED.items() if description.get(key)]
    if description.get("bias", "none") != "none":
        unsupported.append(f"bias={description['bias']!r}")
    if isinstance(init := description.get("init_lora_weights"), str) and init not in ("gaussian", "orthogonal"):
        unsupported.append(f"init_lora_weights={init!r} (may have changed the base)")
    if unsupported:
        raise ValueError(f"{path} asks for what can't be loaded here: {', '.join(unsupported)}.")
    try:
        return LoRAConfig(
            rank=description["r"],
            alpha=description["lora_alpha"],
            dropout=description.get("lora_dropout") or 0.0,
            targets=_exactly(names),
            rank_pattern=description.get("rank_pattern") or {},
            alpha_pattern=description.get("alpha_pattern") or {},
            rslora=bool(description.get("use_rslora")),
        )
    except KeyError as error:
        raise ValueError(f"{path} has no entry {error}; expected r and lora_alpha.") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _expected_shapes(module: nn.Module, name: str, config: LoRAConfig, folder: Path) -> dict[str, tuple[int, ...]]:
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    if name not in layers:
        raise ValueError(
            f"The adapter in {folder} adapts {name!r}, which this {type(module).__name__} has not. Layers that can be "
            f"adapted: {', '.join(layers) or 'none'}."
        )
    rank = config.rank_of(name)
    out_features, in_features = layers[name].weight.shape
    return {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}


def _refuse_other_adapters(module: nn.Module, names: list[str], config: LoRAConfig, folder: Path) -> None:
    """Adapters that are attached already have to be the ones that the folder describes."""
    attached = {name: layer.lora_scaling for name, layer in adapted_layers(module).items()}
    described = {name: config.scaling_of(name) for name in names}
    if attached != described:
        raise ValueError(
            f"The adapter in {folder} is another than the one attached (layers with their scale alpha / rank): "
            f"{described} in the folder, {attached} attached. Call detach(module) first."
        )
