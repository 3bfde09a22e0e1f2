"""Identifies a base by digests, and by a sample of values that tolerates a change of precision."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lightning.lora.adapter import dense, is_distributed, is_quantized
from lora_lightning.lora.record import unwrapped
from lora_lightning.lora.sharding import full
from lora_lightning.lora.state import adapter_keys, saved_keys

_TENSORS, _VALUES = 256, 4
"""Maximum number of tensors in a sample of a base, and of values per tensor."""


def base_fingerprint(module: nn.Module, but: Container[str] = ()) -> str:
    """Return a SHA-256 digest of the base: the names, shapes, dtypes and values of its parameters and buffers.

    The digest excludes adapters, so it is the same before `attach` and after training. It also excludes modules that
    are trained in full and buffers that are not in the state dict. Distributed tensors are gathered one at a time, and
    all processes have to call this.

    Args:
        module: A plain or adapted module.
        but: Further state-dict keys to exclude.
    """
    return _fingerprint_of(base_tensors(module, but))


def fingerprint_and_sample(module: nn.Module) -> tuple[str, str]:
    """Return the fingerprint of the base, and a few of its values as JSON for `is_in_another_precision`."""
    tensors = list(base_tensors(module))
    return _fingerprint_of(tensors), _sample_of(tensors)


def _sample_of(tensors: list[tuple[str, Tensor]]) -> str:
    found = {key: [_precision(value), *_values(value)] for key, value in _sampled(tensors)}
    return json.dumps(found, separators=(",", ":"))


def _fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for key, value in tensors:
        _add(digest, key, value)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, key: str, value: Tensor) -> None:
    digest.update(f"{key} {tuple(value.shape)} {value.dtype}\n".encode())
    for data in _bytes(value):
        digest.update(data)


@dataclass(frozen=True)
class BaseDigests:
    """Holds what identifies a base, from one pass over its values.

    Attributes:
        fingerprint: The `base_fingerprint`.
        sample: A few of its values as JSON, as `fingerprint_and_sample` returns them.
        of_tensors: The digest of each tensor by state-dict key, as `digests` returns them.
        places: Where each tensor was, and how often PyTorch had written to it. `None` if this cannot be told.
    """

    fingerprint: str
    sample: str
    of_tensors: dict[str, str]
    places: dict[str, tuple[int, int]] | None

    @classmethod
    def of(cls, module: nn.Module) -> BaseDigests:
        """Compute the digests of a plain or adapted module. All processes have to call this."""
        total, found = hashlib.sha256(), {}
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for key, value in base_tensors(module):
                gathered = full(value)
                found[key] = pool.submit(_digest, gathered)
                _add(total, key, gathered)
                found[key].result()
        of_tensors = {key: digest.result() for key, digest in found.items()}
        return cls(total.hexdigest(), _sample_of(list(base_tensors(module))), of_tensors, _places(module))

    def is_current(self, module: nn.Module) -> bool:
        """Return whether the tensors are still the same ones, and PyTorch has not written to them."""
        return self.places is not None and self.places == _places(module)


def _places(module: nn.Module) -> dict[str, tuple[int, int]] | None:
    tensors = list(base_tensors(module))
    if any(is_distributed(value) or is_quantized(value) or value.is_inference() for _, value in tensors):
        return None
    return {key: (value.data_ptr(), value._version) for key, value in tensors}


def digests(module: nn.Module, only: Container[str] | None = None) -> dict[str, str]:
    """Return the digests of the tensors of the base by state-dict key, or `only` of some of them.

    Tensors are hashed with as many threads as PyTorch uses. Distributed tensors are gathered and hashed one at a time.
    """
    found = {}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for key, value in base_tensors(module):
            if only is None or key in only:
                gathered = full(value)
                found[key] = pool.submit(_digest, gathered)
                if gathered is not value:
                    found[key].result()
        return {key: digest.result() for key, digest in found.items()}


def _digest(value: Tensor) -> str:
    digest = hashlib.sha256(f"{tuple(value.shape)} {value.dtype}\n".encode())
    for data in _bytes(value):
        digest.update(data)
    return digest.hexdigest()


def is_in_another_precision(module: nn.Module, sample: str, but: Container[str] = ()) -> bool:
    """Return whether a base with another fingerprint is the sampled base in another precision."""
    own, other = dict(_sampled(base_tensors(module, but))), json.loads(sample)
    if own.keys() != other.keys() or all(_precision(value) == other[key][0] for key, value in own.items()):
        return False
    for key, value in own.items():
        _, *expected = other[key]
        # Quantization to four bits may change a value by an eighth of the largest one.
        rounding = (0.15 if is_quantized(value) else 1e-3) * float(dense(value).abs().max())
        values = _values(value)
        if len(values) != len(expected):
            return False
        if not all(abs(a - b) <= 0.01 * abs(b) + rounding for a, b in zip(values, expected, strict=True)):
            return False
    return True


def base_tensors(module: nn.Module, but: Container[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and persistent buffers of the base, by state-dict key, and what a quantized weight needs.

    Other entries of the state dict, such as the states of a metric, belong to the user's code.
    """
    module = unwrapped(module)
    others = adapter_keys(module) | saved_keys(module)
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    registered = {key for key, _ in named}
    for key, value in module.state_dict().items():
        if isinstance(value, Tensor) and key not in others and key not in but and _belongs_to(key, registered):
            yield key, value


def _belongs_to(key: str, registered: set[str]) -> bool:
    """Return whether a key is that of a registered tensor or of a part of it, as `weight.absmax` of bitsandbytes."""
    return key in registered or ("." in key and _belongs_to(key.rpartition(".")[0], registered))


def _bytes(value: Tensor) -> Iterator[memoryview]:
    for part in _parts(full(value)):
        yield part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _parts(value: Tensor) -> list[Tensor]:
    """Return the plain tensors of a tensor: itself, or the components of a quantized one."""
    if not is_quantized(value):
        return [value]
    names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined] # every tensor subclass of torchao has it
    return [getattr(value, name) for name in names]


def _sampled(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield floating-point tensors, evenly spaced."""
    found = [(key, value) for key, value in tensors if value.is_floating_point() and value.numel()]
    yield from found[:: -(-len(found) // _TENSORS) or 1]


def _precision(value: Tensor) -> str:
    return f"{value.dtype} of {type(value).__name__}" if is_quantized(value) else str(value.dtype)


def _values(value: Tensor) -> list[float]:
    """Return evenly spaced values of a tensor."""
    flat = dense(full(value)).reshape(-1)
    last, count = len(flat) - 1, min(_VALUES, len(flat))
    return [float(f"{float(flat[last * place // max(count - 1, 1)]):.6g}") for place in range(count)]
