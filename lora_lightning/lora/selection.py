"""What of a module can be adapted, what a configuration selects of it, and every complaint about that."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_lightning.lora.config import LoRAConfig, matches, pattern_matches, unmatched
from lora_lightning.lora.effective import read_in_code
from lora_lightning.lora.layers import (
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAEmbedding,
    LoRALinear,
    LoRATransposedLinear,
)
from lora_lightning.lora.update import LowRankUpdate, ParameterUpdate, dense

SIDE_PATHS: dict[type[nn.Module], type[LowRankUpdate]] = {
    nn.Linear: LoRALinear,
    nn.Conv1d: LoRAConv1d,
    nn.Conv2d: LoRAConv2d,
    nn.Conv3d: LoRAConv3d,
    nn.Embedding: LoRAEmbedding,
}
"""From a layer's class to the class it is swapped for."""

_TRANSPOSED = "transformers.pytorch_utils.Conv1D"
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_SHOWN = 20
_SUPPORTED = (
    "nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.MultiheadAttention, nn.LSTM, nn.GRU, nn.RNN, their cells, "
    "and the transformers library's Conv1D"
)


@dataclass(frozen=True)
class Candidate:
    """A weight that can be adapted."""

    name: str
    """The layer's dotted name; with the parameter's name after it where a layer has several weights."""
    layer_name: str
    layer: nn.Module
    parameter: str
    side_path: type[LowRankUpdate] | None
    """What the layer's forward becomes; `None` if the layer reads its weight and is to find W + ΔW there."""

    @property
    def names(self) -> tuple[str, str]:
        """What `targets` and patterns may call it."""
        return self.name, self.layer_name

    @property
    def weight(self) -> Tensor | None:
        """The weight itself; `None` if it is computed from other parameters."""
        return self.layer._parameters.get(self.parameter)

    @property
    def update_class(self) -> type[LowRankUpdate]:
        """Of what will hold the adapter: the layer itself, or a module beside the parameter."""
        return self.side_path or ParameterUpdate

    @property
    def holder_name(self) -> str:
        """The dotted name of what will hold the adapter."""
        return self.layer_name if self.side_path else f"{self.layer_name}.lora_{self.parameter}".lstrip(".")


def candidates(module: nn.Module, config: LoRAConfig | None = None) -> dict[str, Candidate]:
    """All that can be adapted, by name; with the `target_parameters` of a configuration among it."""
    found: dict[str, Candidate] = {}
    wanted = config.target_parameters if config else []
    for layer_name, layer in module.named_modules():
        by_name = {key for key in layer._parameters if matches(wanted, f"{layer_name}.{key}".lstrip("."))}
        side_path = side_path_of(layer)
        if side_path is not None and not by_name:
            found[layer_name] = Candidate(layer_name, layer_name, layer, "weight", side_path)
            continue
        for key in layer._parameters:
            if layer._parameters[key] is not None and (key in by_name or key in _read_weights(layer)):
                name = f"{layer_name}.{key}".lstrip(".")
                found[name] = Candidate(name, layer_name, layer, key, None)
    return found


def select(module: nn.Module, config: LoRAConfig) -> list[Candidate]:
    """What `config` selects.

    Raises:
        ValueError: If a target matches nothing, or something that is selected can't be adapted; all that is wrong is
            in one message.
    """
    modules = dict(module.named_modules())
    known = candidates(module, config)
    whole = [name for name in modules if name and matches(config.trainable, name)]
    selected = [
        candidate
        for candidate in known.values()
        if (config.selects(*candidate.names) or matches(config.target_parameters, candidate.name))
        and not any(candidate.layer_name == name or candidate.layer_name.startswith(f"{name}.") for name in whole)
    ]
    names = {name for candidate in known.values() for name in candidate.names}
    missing = [
        *unmatched(config.targets, names),
        *unmatched(config.target_parameters, known),
        *unmatched(config.trainable, [name for name in modules if name]),
    ]
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not any(pattern_matches(pattern, name) for candidate in selected for name in candidate.names):
            missing.append(pattern)
    if missing or not (selected or config.bypass):
        raise ValueError(_no_match(modules, list(known), missing))
    complaints = [complaint for candidate in selected for complaint in _complaints(candidate, config)]
    if config.bypass is not None:
        complaints += _complaints_about_bypass(module, config, config.bypass)
    if complaints:
        more = [f"(and {len(complaints) - 5} more)"] if len(complaints) > 5 else []
        raise ValueError(" ".join(complaints[:5] + more))
    return selected


def holder_of_parameters(module: nn.Module) -> nn.Module:
    """The part of a module to adapt: its one child that holds all parameters, else the whole.

    For a `Classifier` this is the backbone, so that an adapter folder has the backbone's own layer names and serves
    the bare backbone as well.
    """
    holders = [child for child in module.children() if any(True for _ in child.parameters())]
    own = list(module.parameters(recurse=False))
    return holders[0] if len(holders) == 1 and not own else module


def read_elsewhere(module: nn.Module) -> set[tuple[str, str]]:
    """Names of children and their parameters that code of this module, or of one inside it, reads."""
    return read_in_code(type(layer) for layer in module.modules())


def side_path_of(layer: nn.Module) -> type[LowRankUpdate] | None:
    """What the forward of this layer, not adapted yet, may become.

    A side path stands for the forward that its layer has, so it serves where that is the one known; a subclass may
    have another.
    """
    cls = type(layer)
    if f"{cls.__module__}.{cls.__qualname__}" == _TRANSPOSED:
        return LoRATransposedLinear
    if "forward" in layer.__dict__:
        return None
    for plain, side_path in SIDE_PATHS.items():
        same = all(getattr(cls, key, None) is getattr(plain, key, None) for key in ("forward", "_conv_forward"))
        if isinstance(layer, plain) and same:
            return side_path
    return None


def _read_weights(layer: nn.Module) -> tuple[str, ...]:
    """The weights that a layer of a known kind reads itself."""
    if isinstance(layer, nn.MultiheadAttention):
        return _ATTENTION
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
        return tuple(key for key in layer._parameters if key.startswith("weight_"))
    return ("weight",) if isinstance(layer, tuple(SIDE_PATHS)) else ()


def _complaints(candidate: Candidate, config: LoRAConfig) -> Iterator[str]:
    name, layer, weight = candidate.name, candidate.layer, candidate.weight
    leave_out = f"leave it out with exclude=[{name!r}]."
    if weight is None:
        yield (
            f"Layer {name!r} computes its weight from other parameters (as pruning and weight normalisation do): make that "
            f"permanent first, or {leave_out}"
        )
        return
    if is_lazy(weight):
        yield f"Layer {name!r} has no weight yet: run a batch through the model first, or {leave_out}"
        return
    if not weight.is_floating_point():
        yield f"Layer {name!r} has a weight of {weight.dtype}; only floating-point layers can be adapted."
        return
    if weight.dim() < 2:
        yield f"Parameter {name!r} is of shape {tuple(weight.shape)}; adapters need two or more dimensions."
        return
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq):
        yield (
            f"Layer {name!r} is an nn.Embedding with max_norm or scale_grad_by_freq, which rewrites its weight or its "
            f"gradient in every step: {leave_out}"
        )
    if candidate.side_path is None and config.dropout:
        yield (
            f"Layer {name!r} reads its weight, where dropout={config.dropout} on an adapter's input can't be applied: use "
            f"dropout=0, or {leave_out}"
        )
    if isinstance(layer, nn.Sequential | nn.ModuleList | nn.ModuleDict) and candidate.side_path is None:
        yield f"Parameter {name!r} is that of a {type(layer).__name__}, which would take the adapter for one of its modules."
    if config.init == "pissa" and not bool(dense(weight).isfinite().all()):
        yield f"Layer {name!r} has weights that are not finite, of which PiSSA can't take singular values: {leave_out}"
    rank, limit = config.rank_of(*candidate.names), min(candidate.update_class.lora_matrix_shape(weight))
    if rank > limit:
        yield (
            f"rank={rank} exceeds layer {name!r}, whose weight of shape {tuple(weight.shape)} has rank {limit} at most. "
            f"Choose a smaller rank, or one for this layer with rank_pattern={{{name!r}: {limit}}}."
        )


def _complaints_about_bypass(module: nn.Module, config: LoRAConfig, bypass: tuple[int, int]) -> Iterator[str]:
    if config.rank > min(bypass):
        yield f"rank={config.rank} exceeds the bypass of {bypass[0]} -> {bypass[1]}, which has rank {min(bypass)} at most."
    if side_path_of(module) is not None:
        yield f"A {type(module).__name__} gets an adapter of its own; a bypass goes around a module that holds layers."


def _no_match(modules: dict[str, nn.Module], known: list[str], missing: list[str]) -> str:
    """The message for targets that select nothing."""
    unsupported = [
        f"{target!r} is a {type(layer).__name__}"
        for target in missing
        for name, layer in modules.items()
        if name and (name == target or name.endswith(f".{target}"))
    ]
    what = f"Targets {missing} match no layer" if missing else "No layer is left to adapt"
    why = f" ({'; '.join(dict.fromkeys(unsupported))})" if unsupported else ""
    close = [name for target in missing for name in difflib.get_close_matches(target, known)]
    shown = list(dict.fromkeys(close + known))[:_SHOWN] if len(known) > _SHOWN else known
    more = f" and {len(known) - len(shown)} more" if len(known) > len(shown) else ""
    return f"{what} of a supported kind ({_SUPPORTED}){why}. Layers that can be adapted: {', '.join(shown) or 'none'}{more}."


def bypass_weight(module: nn.Module, bypass: tuple[int, int]) -> Tensor:
    """Stands for the weight that a bypass has not: zeros of shape (out, in) that take no memory."""
    first = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), torch.zeros(()))
    return first.detach().new_zeros(()).expand(bypass[1], bypass[0])
