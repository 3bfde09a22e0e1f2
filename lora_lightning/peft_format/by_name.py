"""Converts adapters of parameters by name, such as those of experts, to PEFT's format and back.

PEFT wraps the module that holds the parameters, once per adapted parameter in the order of the module. The last one is
the outermost, and each inner one has one more `.base_layer` in its name. PEFT's A has the shape (experts * r, in),
expert by expert. Its B has the shape (out, r * experts), where the experts of each rank are adjacent.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from lora_lightning.lora import AdaptedWeight, adapted_weights
from lora_lightning.lora.adapter import layers_of
from lora_lightning.lora.readers import ParameterKind
from lora_lightning.lora.targets import Target

_INSIDE = ".base_layer"


def is_by_name(target: Target) -> bool:
    """Return whether PEFT adapts this parameter by name: one of two dimensions, or with one adapter per expert."""
    if target.layout.experts:
        return True
    return isinstance(target.kind, ParameterKind) and target.outline().dim() == 2


def by_name_to_peft(adapted: AdaptedWeight, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of the adapters by PEFT's keys."""
    together = {
        found.parameter
        for found in adapted_weights(adapted.layer, adapted.adapter_name)
        if found.layer is adapted.layer
    }
    adapted_keys = [key for key in adapted.layer._parameters if key in together]
    name = prefix + adapted.layer_name + _INSIDE * (len(adapted_keys) - 1 - adapted_keys.index(adapted.parameter))
    a, b = adapted.adapter.factors()
    if adapted.layout.experts:
        a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def by_name_from_peft(tensors: dict[str, Tensor], target_parameters: Iterable[str], module: nn.Module) -> list[str]:
    """Convert the tensors of parameters that PEFT adapted by name to our keys and shapes, in place.

    Args:
        tensors: The tensors of a folder, by our keys for layers.
        target_parameters: The names in PEFT's configuration, each the full name of a parameter or a suffix of it after
            a dot.
        module: The plain base.

    Returns:
        The full names of the parameters.
    """
    modules = dict(layers_of(module))
    ends = tuple(f".{name}" for name in target_parameters)
    found: list[str] = []
    for layer in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
        depth, name = layer.count(_INSIDE), layer.replace(_INSIDE, "")
        parameters = dict(modules[name].named_parameters(recurse=False)) if name in modules else {}
        keys = [key for key in parameters if f".{name}.{key}".endswith(ends)]
        if depth >= len(keys):
            continue
        key = keys[len(keys) - 1 - depth]
        a, b = (tensors.pop(f"{layer}.{part}", None) for part in ("lora_A", "lora_B"))
        if a is not None and b is not None and parameters[key].dim() == 3:
            experts = len(parameters[key])
            if a.dim() == b.dim() == 2 and len(a) % experts == b.shape[1] % experts == 0:
                a, b = a.view(experts, -1, a.shape[1]).transpose(0, 1), b.view(len(b), -1, experts)
        factors = {"lora_A": a, "lora_B": b}
        tensors |= {f"{name}.lora_{key}.{part}": factor for part, factor in factors.items() if factor is not None}
        found.append(f"{name}.{key}")
    return found
