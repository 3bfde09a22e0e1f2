"""Finds the targets in a batch and the outputs of a model, whatever contains them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

TARGET_NAMES = ("labels", "label", "targets", "target", "y", "mask")
_OUTPUT_NAMES = (
    "logits",
    "out",
    "output",
    "preds",
    "pred",
    "prediction",
    "predictions",
    "y_hat",
    "y_pred",
    "scores",
    "probs",
)


@dataclass(frozen=True)
class Candidate:
    """Describes a tensor in the output of a model that may be compared with the targets.

    Args:
        place: Where the tensor is: `logits`, `[1]`, or an empty string if it is the whole output.
        tensor: The tensor.
        is_named: Whether the place has one of the usual names for outputs, or is the only possible one.
    """

    place: str
    tensor: Tensor
    is_named: bool


def find_targets(batch: object, key: str | int | None = None) -> Tensor | None:
    """Return the targets in `batch`, or `None` if they are not found.

    Args:
        batch: A mapping, a named tuple or an object with one of the usual names (`labels`, `label`, `targets`,
            `target`, `y`, `mask`), or a sequence whose second element is or contains the targets.
        key: Key, attribute or position of the targets, if it differs.
    """
    names = TARGET_NAMES if key is None else (key,)
    found = next((value for name in names if (value := _entry(batch, name)) is not None), None)
    if found is None and key is None and isinstance(batch, tuple | list) and len(batch) > 1:
        found = batch[1]
    if found is None or isinstance(found, Tensor):
        return found if found is not None and found.dim() else None
    return find_targets(found) if not isinstance(found, tuple | list) or hasattr(found, "_fields") else None


def candidates(output: object, key: str | int | None = None) -> list[Candidate]:
    """Return the floating-point tensors in an output, starting with those that are named like outputs.

    Args:
        output: A tensor, or a mapping, named tuple, sequence or object with tensors.
        key: Key, attribute or position of the only candidate, if known.
    """
    if key is not None and not isinstance(output, Tensor):
        chosen = _entry(output, key)
        return [Candidate(str(key), chosen, True)] if isinstance(chosen, Tensor) else []
    found = [each for each in _candidates(output) if each.tensor.is_floating_point()]
    # A single number beside others is a loss, even if a batch of one sample could have such an output.
    return [each for each in found if each.tensor.dim() or len(found) == 1]


def tensors_of(output: object) -> Iterator[Tensor]:
    """Yield the tensors in an output, starting with those that are named like outputs."""
    return (each.tensor for each in _candidates(output))


def described(value: object) -> str:
    """Return a description of a batch or an output: `{image: (8, 3, 32, 32), label: (8,)}`."""
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {described(each)}" for key, each in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(described(each) for each in value[:5]) + (", ...]" if len(value) > 5 else "]")
    return type(value).__name__


def entries(thing: object) -> list[tuple[str, object]]:
    """Return the named or numbered parts of a mapping, a sequence or an object."""
    if isinstance(thing, Mapping):
        return [(str(key), value) for key, value in thing.items()]
    if isinstance(thing, tuple | list):
        names: Iterable[str] = getattr(thing, "_fields", None) or (f"[{place}]" for place in range(len(thing)))
        return list(zip(names, thing, strict=True))
    if thing is None or isinstance(thing, Tensor | nn.Module | str | bytes) or not hasattr(thing, "__dict__"):
        return []
    return list(vars(thing).items())


def _candidates(output: object) -> list[Candidate]:
    if isinstance(output, Tensor):
        return [Candidate("", output, True)]
    parts = [(name, _entry(output, name)) for name in _OUTPUT_NAMES]
    found = {name: Candidate(name, value, True) for name, value in parts if isinstance(value, Tensor)}
    rest = entries(output)
    tensors = [(name, value) for name, value in rest if isinstance(value, Tensor) and name not in found]
    is_only = not found and sum(each.dim() > 0 and each.is_floating_point() for _, each in tensors) == 1
    found |= {name: Candidate(name, value, is_only and value.dim() > 0) for name, value in tensors}
    for name, value in rest:  # (loss, outputs), or an object with the outputs of each head
        if not isinstance(value, Tensor):
            inside = [(inner, _entry(value, inner)) for inner in _OUTPUT_NAMES]
            nested = {f"{name}.{inner}": each for inner, each in inside if isinstance(each, Tensor)}
            found |= {place: Candidate(place, each, False) for place, each in nested.items()}
    return list(found.values())


def _entry(thing: object, name: str | int) -> object:
    """Return the part of this name or number, or `None`."""
    if thing is None or isinstance(thing, Tensor | nn.Module | str | bytes):
        return None
    if isinstance(thing, Mapping):
        return thing.get(name)
    if isinstance(name, int):
        fits = isinstance(thing, tuple | list) and -len(thing) <= name < len(thing)
        return thing[name] if fits and isinstance(thing, tuple | list) else None
    if isinstance(thing, tuple | list) and name not in getattr(thing, "_fields", ()):
        return None  # a method of sequences, such as `count`
    found: object = getattr(thing, name, None)
    return found
