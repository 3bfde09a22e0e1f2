"""Gives adapters of experts the form that PEFT has for them, and back.

PEFT wraps the module that holds the parameters, once for each adapted one in the order of the module: the last is the outermost,
and each further inside has `.base_layer` in its name once more. Its A has the shape (experts * r, in), expert by expert. Its B
has the shape (out, r * experts), with the experts of each rank side by side.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lora_lightning.lora import AdaptedWeight
from lora_lightning.lora.experts import ExpertsParameter

_INSIDE = ".base_layer"


def is_experts(each: AdaptedWeight) -> bool:
    """Return whether this is a parameter with an adapter for each expert."""
    return issubclass(each.kind, ExpertsParameter)


def experts_to_peft(each: AdaptedWeight, prefix: str) -> dict[str, Tensor]:
    """Return the adapters' tensors by PEFT's keys."""
    adapted = [key for key in each.layer._parameters if f"lora_{key}" in each.layer._modules]
    name = prefix + each.layer_name + _INSIDE * (len(adapted) - 1 - adapted.index(each.parameter))
    a, b = each.adapter.lora_factors()
    return {f"{name}.lora_A.weight": a.transpose(0, 1).flatten(0, 1), f"{name}.lora_B.weight": b.flatten(1)}


def experts_from_peft(tensors: dict[str, Tensor], wanted: Iterable[str], module: nn.Module) -> list[str]:
    """Rename the tensors of parameters that PEFT adapted by name to our keys, in place, and give them our shapes.

    Args:
        tensors: Those of a folder, by our keys for layers.
        wanted: PEFT's `target_parameters`, each the whole name of a parameter or the end of it after a dot.
        module: The plain base.

    Returns:
        The whole names of the parameters.
    """
    modules: dict[str, Any] = dict(module.named_modules())
    ends = tuple(f".{name}" for name in wanted)
    found: list[str] = []
    for holder in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
        depth, name = holder.count(_INSIDE), holder.replace(_INSIDE, "")
        parameters = dict(modules[name].named_parameters(recurse=False)) if name in modules else {}
        keys = [key for key in parameters if f".{name}.{key}".endswith(ends)]
        if depth >= len(keys):
            continue
        key = keys[len(keys) - 1 - depth]
        a, b = (tensors.pop(f"{holder}.{part}", None) for part in ("lora_A", "lora_B"))
        if a is not None and b is not None and parameters[key].dim() == 3:
            experts = len(parameters[key])
            if a.dim() == b.dim() == 2 and len(a) % experts == b.shape[1] % experts == 0:
                a, b = a.view(experts, -1, a.shape[1]).transpose(0, 1), b.view(len(b), -1, experts)
        tensors |= {
            f"{name}.lora_{key}.{part}": each for part, each in (("lora_A", a), ("lora_B", b)) if each is not None
        }
        found.append(f"{name}.{key}")
    return found
