"""Adapters on disk, in PEFT's folder format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_lightning.lora.adapter import adapted_layers, attach_beside, fingerprint, is_adapted
from lora_lightning.lora.attached import adapter_names, attachment, bare, sites
from lora_lightning.lora.config import LoRAConfig, matches
from lora_lightning.lora.peft_format import (
    OWN_TYPE,
    PREFIX,
    check_method,
    configuration,
    describe,
    expected_shapes,
    exported,
    known_to_peft,
    own_key,
)
from lora_lightning.lora.selection import Candidate, candidates
from lora_lightning.lora.several import switch_adapter

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_DIGEST, _CONFIG_DIGEST = "lora_lightning_sha256", "lora_lightning_config_sha256"
_BASE = "lora_lightning_base_sha256"
"""Metadata of the weights, which the format itself has not: SHA-256 of the tensors and of the configuration, and the base's
fingerprint."""


def save_adapter(module: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes the adapters of `module` to `folder`, in PEFT's format, and modules trained whole with them.

    Adapters made by PiSSA are written as the difference that they make to the base as it is, of twice their rank. Where an
    adapter sits in a layer that PEFT does not know, or gets wrong, `peft_type` says `LORA_LIGHTNING`, and PEFT refuses it.

    Args:
        module: A module that `attach` was called with. Layer names in the files are relative to it.
        folder: Made if missing.

    Raises:
        ValueError: If `module` is not adapted.
        FileExistsError: If the folder holds an adapter already.
    """
    attachment(module)
    folder = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if (folder / name).exists():
            raise FileExistsError(
                f"{folder / name} exists: it is not overwritten. Choose another folder, or remove the adapter there."
            )
    description, tensors = describe(module), exported(module)
    folder.mkdir(parents=True, exist_ok=True)
    # Each file appears whole or not at all; the configuration, without which the folder is no adapter, comes last.
    text = json.dumps(description, indent=2) + "\n"
    digests = {_DIGEST: _digest(tensors), _CONFIG_DIGEST: hashlib.sha256(text.encode()).hexdigest()}
    digests[_BASE] = fingerprint(module)
    unfinished = folder / f".{WEIGHTS_NAME}.unfinished"
    save_file(tensors, unfinished, metadata={"format": "pt", **digests})
    unfinished.replace(folder / WEIGHTS_NAME)
    unfinished = folder / f".{CONFIG_NAME}.unfinished"
    unfinished.write_text(text)
    unfinished.replace(folder / CONFIG_NAME)


def load_adapter(module: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> list[str]:
    """Loads the adapters in `folder`, written by `save_adapter` or by PEFT; attaches them if `module` has none.

    Args:
        module: The base, plain or adapted.
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.
        name: What to call them. If adapters of this name are there, they get the numbers in the folder, and have to have the
            same layers, ranks and scales. If only others are, those are set aside, for `switch_adapter`.

    Returns:
        The names of the adapted layers.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If a file is damaged, holds another kind of adapter, or does not fit `module`; `module` is then
            unchanged.
    """
    folder = Path(folder)
    description = _read_description(folder / CONFIG_NAME)
    check_method(description, folder / CONFIG_NAME)
    tensors, whole = _read_tensors(folder / WEIGHTS_NAME, description)
    config, selected = _what_is_adapted(module, folder, description, tensors)
    _check_shapes(module, folder, config, selected, tensors, whole)
    if is_adapted(module) and name in adapter_names(module):
        _use_if_alike(module, config, selected, folder, name)
    else:
        attach_beside(module, config, selected, name)
    state = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for key, value in (tensors | whole).items():
            state[key].copy_(value)
    _warn_if_edited(folder)
    if description["peft_type"] != OWN_TYPE:
        _warn_where_peft_is_wrong(module, folder)
    return list(adapted_layers(module))


def trained_on(folder: str | os.PathLike[str]) -> str | None:
    """The `fingerprint` of the base that the adapters in a folder were saved with; `None` if PEFT wrote it.

    `load_adapter` does not ask for it: a base in another precision has another one.
    """
    return _metadata(Path(folder)).get(_BASE)


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


def _read_tensors(path: Path, description: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapters' tensors by our own keys, and those of modules trained whole by state-dict key."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Expected the adapter's weights beside its {CONFIG_NAME}.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}). Write the adapter again.") from None
    if metadata.get(_DIGEST, digest := _digest(tensors)) != digest:
        raise ValueError(f"{path} is damaged: its checksum is not that of its tensors. Write the adapter again.")
    own = {key: name for key in tensors if (name := own_key(key))}
    whole = {key: key.removeprefix(PREFIX) for key in tensors if key not in own and _is_of_whole(key, description)}
    foreign = [key for key in tensors if key not in own and key not in whole]
    if foreign or not own:
        found = f"holds {', '.join(foreign[:5])}" if foreign else "is empty"
        raise ValueError(f"{path} {found}; expected keys like '{PREFIX}<layer>.lora_A.weight' alone.")
    return {own[key]: tensors[key] for key in own}, {whole[key]: tensors[key] for key in whole}


def _is_of_whole(key: str, description: dict[str, Any]) -> bool:
    wanted = list(description.get("modules_to_save") or [])
    return key.startswith(PREFIX) and any(matches(wanted, parent) for parent in _parents(key.removeprefix(PREFIX)))


def _parents(key: str) -> list[str]:
    """Names of the modules that a state-dict key is inside of."""
    parts = key.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _what_is_adapted(
    module: nn.Module,
    folder: Path,
    description: dict[str, Any],
    tensors: dict[str, Tensor],
) -> tuple[LoRAConfig, list[Candidate]]:
    """The configuration in our terms, and the weights that it adapts; renames the tensors to our keys."""
    with bare(module):
        modules = dict(module.named_modules())
        names: dict[str, None] = {}
        for key in list(tensors):
            holder, _, leaf = key.rpartition(".")
            layer_name, _, last = holder.rpartition(".")
            if isinstance(modules.get(holder), nn.MultiheadAttention):
                tensors[f"{holder}.lora_in_proj_weight.{leaf}".lstrip(".")] = tensors.pop(key)
                names[f"{holder}.in_proj_weight".lstrip(".")] = None
            elif last.startswith("lora_"):
                names[f"{layer_name}.{last.removeprefix('lora_')}".lstrip(".")] = None
            else:
                names[holder] = None
        wanted = list(description.get("modules_to_save") or [])
        trained = [name for name in modules if name and matches(wanted, name)]
        if wanted and not trained:
            raise ValueError(
                f"The adapter in {folder} comes with modules_to_save={wanted}, none of which is in this {type(module).__name__}."
            )
        config = configuration(description, folder / CONFIG_NAME, list(names), trained)
        known = candidates(module, config)
    missing = [name for name in names if name not in known and not (config.bypass and not name)]
    if missing:
        raise ValueError(
            f"The adapter in {folder} adapts {missing[0]!r}, which this {type(module).__name__} has not. Layers that can be "
            f"adapted: {', '.join(known) or 'none'}."
        )
    return config, [candidate for name, candidate in known.items() if name in names]


def _check_shapes(
    module: nn.Module,
    folder: Path,
    config: LoRAConfig,
    selected: list[Candidate],
    tensors: dict[str, Tensor],
    whole: dict[str, Tensor],
) -> None:
    shapes = {key: tuple(value.shape) for key, value in (tensors | whole).items()}
    expected = {key: shape for candidate in selected for key, shape in expected_shapes(candidate, config).items()}
    if config.bypass:
        rank = config.rank_of("")
        expected |= {"lora_A": (rank, config.bypass[0]), "lora_B": (config.bypass[1], rank)}
    expected |= {
        key: tuple(value.shape)
        for key, value in module.state_dict().items()
        if any(matches(config.trainable, parent) for parent in _parents(key))
    }
    if shapes != expected:
        wrong = sorted(key for key in shapes.keys() | expected.keys() if shapes.get(key) != expected.get(key))
        listed = "; ".join(
            f"{key} is {shapes.get(key, 'missing')}, expected {expected.get(key, 'none')}" for key in wrong[:5]
        )
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        grouped = any(getattr(candidate.layer, "groups", 1) > 1 for candidate in selected)
        why = " Of a grouped convolution, PEFT's adapter mixes the groups: it is none of this layer." if grouped else ""
        raise ValueError(f"The adapter in {folder} does not fit this {type(module).__name__}: {listed}{more}.{why}")


def _use_if_alike(module: nn.Module, config: LoRAConfig, selected: list[Candidate], folder: Path, name: str) -> None:
    """Adapters of this name that are there have to be the ones that the folder describes."""
    in_use = attachment(module).name
    switch_adapter(module, name)
    attached = {site.name: site.update.lora_scaling for site in sites(module)}
    described = {candidate.name: config.scaling_of(*candidate.names) for candidate in selected}
    described |= {"": config.scaling_of("")} if config.bypass else {}
    if attached != described or attachment(module).config.dora != config.dora:
        switch_adapter(module, in_use)
        raise ValueError(
            f"The adapter in {folder} is another than the one attached (layers with their scale alpha / rank): "
            f"{described} in the folder, {attached} attached. Call detach(module) first, or give it another name."
        )


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _warn_if_edited(folder: Path) -> None:
    digest = hashlib.sha256((folder / CONFIG_NAME).read_bytes()).hexdigest()
    if _metadata(folder).get(_CONFIG_DIGEST, digest) != digest:
        warnings.warn(
            f"{folder / CONFIG_NAME} has changed since the adapter was written: it is damaged, or was edited. What it says now "
            "is in effect.",
            stacklevel=3,
        )


def _metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
        return file.metadata() or {}


def _warn_where_peft_is_wrong(module: nn.Module, folder: Path) -> None:
    wrong = [site.name for site in sites(module) if not known_to_peft(site)]
    if wrong:
        warnings.warn(
            f"PEFT wrote {folder}, and computes otherwise with its adapters of {', '.join(wrong)}: it drops a convolution's "
            "dilation and padding mode (PEFT issue 3697), counts an attention's output projection twice (3774), or passes "
            "by weights that are read. Here they are W + s B A.",
            stacklevel=3,
        )
