"""Reads the trained state of an adapted module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_lightning.lora.adapter import Adapters, layers_of
from lora_lightning.lora.record import adapted_weights, attachment_of, is_adapted, record_of, trained_names, unwrapped


def adapter_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the trained parameters: those of active adapters and of the modules trained in full with them.

    Adapters that are active and frozen are left out.
    """
    module = unwrapped(module)
    trained = {
        f"{prefix}.{name}.{key}"
        for prefix, adapters in _containers(module)
        for name in adapters.trained
        for key in _keys(adapters.adapter(name))
        if key not in adapters.adapter(name).fixed
    }
    trained |= _saved_keys(module, only_trained=True)
    return [value for key, value in module.named_parameters() if key in trained]


def adapter_state_dict(module: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Return the state of the active adapters by state-dict key, with the modules that are trained in full with them.

    Args:
        module: An adapted module.
        name: Name of the adapters. `None` is for those that are active.

    Returns:
        Detached tensors that share memory with `module`.

    Raises:
        ValueError: If there are no adapters with this name.
    """
    module = unwrapped(module)
    state = module.state_dict()
    if name is None:
        wanted = _active_keys(module) | saved_keys(module)
        return {key: value for key, value in state.items() if key in wanted}
    prefixes = tuple(f"{prefix}.{name}." for prefix, adapters in _containers(module) if name in adapters.names())
    if not prefixes:
        raise ValueError(f"This {type(module).__name__} has no adapters named {name!r}.")
    found = {key: value for key, value in state.items() if key.startswith(prefixes)}
    saved = attachment_of(module).saved.get(name)
    trained = {} if saved is None else saved.trained_values()
    return found | {key: value.detach() for key, value in trained.items()}


def adapter_keys(module: nn.Module) -> set[str]:
    """Return the state-dict keys of all adapters, active or not."""
    return {f"{prefix}.{key}" for prefix, adapters in _containers(unwrapped(module)) for key in _keys(adapters)}


def saved_keys(module: nn.Module) -> set[str]:
    """Return the state-dict keys of the modules that are trained in full with the active adapters."""
    return _saved_keys(module, only_trained=False)


@contextmanager
def with_values(module: nn.Module, values: Mapping[str, Tensor], name: str | None = None) -> Iterator[None]:
    """Give the tensors of adapters these values within this context, if there is one for each.

    Args:
        module: An adapted module.
        values: Values by state-dict key.
        name: Name of the adapters. `None` is for those that are active.
    """
    own = adapter_state_dict(module, name) if values else {}
    differing = [key for key, value in own.items() if key in values and values[key].data_ptr() != value.data_ptr()]
    if not differing or not own.keys() <= values.keys():
        yield
        return
    kept = {key: own[key].clone() for key in differing}
    with torch.no_grad():
        for key in differing:
            own[key].copy_(values[key])
    try:
        yield
    finally:
        with torch.no_grad():
            for key in differing:
                own[key].copy_(kept[key])


def is_untrained(module: nn.Module) -> bool:
    """Return whether `module` has adapters and none of them has an effect yet."""
    with torch.no_grad():
        return is_adapted(module) and all(found.adapter.is_zero() for found in adapted_weights(module))


def _containers(module: nn.Module) -> list[tuple[str, Adapters]]:
    return [(name, child) for name, child in module.named_modules() if isinstance(child, Adapters)]


def _saved_keys(module: nn.Module, only_trained: bool) -> set[str]:
    """Return the state-dict keys of the modules trained in full with the active adapters, or with the trained ones."""
    found = set()
    for prefix, child in layers_of(module):
        attachment = record_of(child)
        if attachment is not None and attachment.saved:
            trained = trained_names(child)
            found |= {
                f"{prefix}.{key}".lstrip(".")
                for name, saved in attachment.saved.items()
                if saved.is_chosen and (name in trained or not only_trained)
                for key in saved.keys
            }
    return found


def _keys(module: nn.Module) -> list[str]:
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return [key for key, _ in tensors]


def _active_keys(module: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}.{key}"
        for prefix, adapters in _containers(module)
        for name in adapters.active
        for key in _keys(adapters.adapter(name))
    }
