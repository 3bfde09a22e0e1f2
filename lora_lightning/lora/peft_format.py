"""PEFT's adapter folder: how its configuration and its keys say what ours do.

The format is that of PEFT 0.21 (https://huggingface.co/docs/peft/developer_guides/checkpoint). Tensors are called
`base_model.model.<layer>.lora_A.weight` and `.lora_B.weight` (`.lora_embedding_A`, `.lora_embedding_B`, and with DoRA
`.lora_magnitude_vector`); a list entry of `target_modules` matches a layer's whole name or the end of it after a dot, a
string is a regular expression for the whole name.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lora_lightning.lora.adapter import is_adapter_key
from lora_lightning.lora.attached import Site, attachment, sites
from lora_lightning.lora.config import LoRAConfig, exactly, matches
from lora_lightning.lora.effective import Adapted
from lora_lightning.lora.layers import LoRATransposedLinear
from lora_lightning.lora.selection import SIDE_PATHS, Candidate

PEFT_TYPE = "LORA"
OWN_TYPE = "LORA_LIGHTNING"
"""Says `adapter_config.json` where an adapter is in a layer that PEFT does not know or gets wrong: PEFT then refuses it."""
PREFIX = "base_model.model."

# What another kind of adapter, or one with more parts than A and B, says in its configuration.
_UNSUPPORTED = {
    "lora_bias": "a bias in the adapter",
    "target_parameters": "parameters adapted by name",
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
_IN_REACH = (*SIDE_PATHS, nn.MultiheadAttention, LoRATransposedLinear)
_SUFFIXES = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}


def describe(module: nn.Module) -> dict[str, Any]:
    """The configuration of the module's adapters, as `adapter_config.json` has it."""
    config, found = _as_plain_lora(module), sites(module)
    names = [site.name for site in found]
    description: dict[str, Any] = {
        "peft_type": PEFT_TYPE,
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.rank if config.alpha is None else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": _target_modules(module, names),
        "bias": "none",
        "fan_in_fan_out": any(isinstance(site.layer, LoRATransposedLinear) for site in found),
        "init_lora_weights": True,
        "modules_to_save": _modules_to_save(module) or None,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": _alpha_pattern(config, found),
        "use_rslora": config.rslora,
        "use_dora": config.dora,
    }
    if any(not known_to_peft(site) for site in found):
        description["peft_type"] = OWN_TYPE
        description["target_parameters"] = [site.name for site in found if site.update is not site.layer]
        description["bypass"] = config.bypass
    return description


def known_to_peft(site: Site) -> bool:
    """Whether PEFT computes with this adapter what we do.

    It drops a convolution's dilation and padding mode (https://github.com/huggingface/peft/issues/3697), mixes the
    channels of its groups, and passes by adapters on weights that are read instead of called (or adds them twice,
    https://github.com/huggingface/peft/issues/3774).
    """
    layer = site.layer
    if site.parameter is None or site.update is not layer or (isinstance(layer, Adapted) and layer.lora_recipe[2]):
        return False
    return not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) or conv_is_plain(layer)


def conv_is_plain(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    """Whether PEFT knows all arguments of this convolution."""
    return layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"


def exported(module: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors by the format's keys; those of PiSSA as a difference, of twice the rank."""
    tensors: dict[str, Tensor] = {}
    for site in sites(module):
        down, up = site.update.lora_factors()
        parts = {site.update.lora_name_A: down, site.update.lora_name_B: up}
        if "lora_magnitude_vector" in site.update._parameters:
            parts["lora_magnitude_vector"] = site.update.lora_magnitude_vector
        holder = (
            site.layer_name if site.update is site.layer else f"{site.layer_name}.lora_{site.parameter}".lstrip(".")
        )
        for key, value in parts.items():
            suffix = ".weight" if key in ("lora_A", "lora_B") else ""
            tensors[f"{PREFIX}{holder}.{key}{suffix}".replace("..", ".")] = value
    state = module.state_dict()
    tensors |= {f"{PREFIX}{key}": state[key] for key in attachment(module).originals}
    return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}


def own_key(key: str) -> str | None:
    """Our state-dict key for one of the format, `None` if it is none of an adapter."""
    name = key.removeprefix(PREFIX)
    if name == key:
        return None
    # PEFT wraps an nn.MultiheadAttention, so that the projection inside it appears one level further in.
    name = name.replace(".base_layer.out_proj.", ".out_proj.")
    for suffix, own in _SUFFIXES.items():
        if name == suffix or name.endswith(f".{suffix}"):
            return name.removesuffix(suffix) + own
    return name if is_adapter_key(name) else None


def check_method(description: dict[str, Any], where: object) -> None:
    """Refuses other methods than LoRA, and LoRA with parts that are not known here.

    Raises:
        ValueError: Naming what is not known.
    """
    kind = description.get("peft_type")
    if kind not in (PEFT_TYPE, OWN_TYPE):
        raise ValueError(f"{where} is of peft_type {kind!r}; expected 'LORA', the only kind that can be loaded here.")
    unsupported = [
        f"{key} ({what})"
        for key, what in _UNSUPPORTED.items()
        if description.get(key) and not (kind == OWN_TYPE and key == "target_parameters")
    ]
    if description.get("bias", "none") != "none":
        unsupported.append(f"bias={description['bias']!r}")
    if isinstance(init := description.get("init_lora_weights"), str) and init not in _ONLY_DRAWS_A:
        unsupported.append(f"init_lora_weights={init!r} (may have changed the base)")
    if unsupported:
        raise ValueError(f"{where} asks for what can't be loaded here: {', '.join(unsupported)}.")


def configuration(description: dict[str, Any], where: object, targets: list[str], whole: list[str]) -> LoRAConfig:
    """Our configuration for PEFT's, with targets that are exactly the layers in the file.

    Raises:
        ValueError: If it has values that make no sense.
    """
    by_name = description.get("target_parameters") or []
    bypass = description.get("bypass")
    layers = [name for name in targets if name not in by_name and not (bypass and not name)]
    try:
        return LoRAConfig(
            rank=description["r"],
            alpha=description["lora_alpha"],
            dropout=description.get("lora_dropout") or 0.0,
            targets=exactly(layers) if layers else [],
            rank_pattern=description.get("rank_pattern") or {},
            alpha_pattern=description.get("alpha_pattern") or {},
            rslora=bool(description.get("use_rslora")),
            dora=bool(description.get("use_dora")),
            target_parameters=exactly(by_name) if by_name else [],
            trainable=exactly(whole) if whole else [],
            bypass=(bypass[0], bypass[1]) if bypass else None,
        )
    except KeyError as error:
        raise ValueError(f"{where} has no entry {error}; expected r and lora_alpha.") from None
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{where}: {error}") from None


def expected_shapes(candidate: Candidate, config: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of one adapter, by our state-dict keys."""
    weight = candidate.weight
    assert weight is not None
    update, rank = candidate.update_class, config.rank_of(*candidate.names)
    out_features, in_features = update.lora_matrix_shape(weight)
    down, up = update.lora_shaped(
        weight.new_empty((rank, in_features), device="meta"),
        weight.new_empty((out_features, rank), device="meta"),
        weight,
    )
    shapes = {update.lora_name_A: tuple(down.shape), update.lora_name_B: tuple(up.shape)}
    if config.dora:
        shapes["lora_magnitude_vector"] = update.lora_magnitude_shape(weight)
    return {f"{candidate.holder_name}.{key}".lstrip("."): shape for key, shape in shapes.items()}


def _as_plain_lora(module: nn.Module) -> LoRAConfig:
    """The configuration; of PiSSA's difference, which has twice the rank at the same scale, that of plain LoRA."""
    config = attachment(module).config
    if config.init != "pissa":
        return config
    found = [site for site in sites(module) if site.parameter is not None]
    ranks = {re.escape(site.name): 2 * site.update.lora_rank for site in found}
    alphas = {
        re.escape(site.name): site.update.lora_scaling * ((2 * site.update.lora_rank) ** (0.5 if config.rslora else 1))
        for site in found
    }
    return replace(config, init="kaiming", rank=2 * config.rank, rank_pattern=ranks, alpha=1.0, alpha_pattern=alphas)


def _target_modules(module: nn.Module, names: list[str]) -> list[str] | str:
    """The full names where a list of them is exact for PEFT, else an expression that is."""
    in_reach = [name for name, layer in module.named_modules() if isinstance(layer, _IN_REACH)]
    caught = {name for name in in_reach if any(name == n or name.endswith(f".{n}") for n in names)}
    return names if caught == set(names) else exactly(names)


def _modules_to_save(module: nn.Module) -> list[str]:
    trainable = attachment(module).config.trainable
    return [name for name, _ in module.named_modules() if name and matches(trainable, name)]


def _alpha_pattern(config: LoRAConfig, found: list[Site]) -> dict[str, float]:
    """PEFT's alpha does not follow the rank: where ours did, the alpha is written out."""
    if config.alpha is not None:
        return config.alpha_pattern
    alphas = {re.escape(site.name): config.alpha_of(site.name, site.layer_name) for site in found}
    return {name: alpha for name, alpha in alphas.items() if alpha != config.rank}
