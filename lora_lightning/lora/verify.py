"""Defines `verify_adapters`, which finds adapters without any effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_lightning.lora.record import adapted_weights
from lora_lightning.lora.state import adapter_parameters, adapter_state_dict
from lora_lightning.lora.targets import AdaptedWeight

_DRAWS = 8
"""Number of random forward passes before an adapter counts as inert, since layers may be dropped at random."""


class InertAdapterError(RuntimeError):
    """Raised for adapters that have no effect on the output."""


def verify_adapters(module: nn.Module, *inputs: object, **keywords: object) -> None:
    """Check that every adapter has an effect on the output: in training, in evaluation, and without gradients.

    An adapter is inert if no value of B changes the output, for example because code reads the weight of the layer in a
    way that `attach` does not cover, or because nothing calls the layer. The check takes five forward and three
    backward passes, and more only if it finds something suspicious. The module, the random state and the gradients are
    not changed.

    Args:
        module: A module with adapters.
        inputs: Positional arguments of the call `module(*inputs, **keywords)`.
        keywords: Keyword arguments of the call.

    Raises:
        InertAdapterError: If an adapter is inert. The message names all inert adapters and the mode.
        ValueError: If the module has no adapters, or they are disabled or merged.
    """
    found = adapted_weights(module)
    if not found:
        raise ValueError(f"This {type(module).__name__} has no adapters to verify. Call attach(module, config) first.")
    if not all(weight.adapters.in_effect.adapters for weight in found):
        raise ValueError(
            f"The adapters of this {type(module).__name__} are disabled or merged. Verify them while they are enabled."
        )

    def call() -> list[Tensor]:
        return list(_tensors(module(*inputs, **keywords)))

    inert: dict[str, list[str]] = {}
    with _left_as_it_was(module):
        _stir(module, found)
        for mode in ("training", "evaluation"):
            module.train(mode == "training")
            suspects = found
            for draw in range(_DRAWS):
                with torch.enable_grad():
                    suspects = _without_gradient(call, suspects, draw)
                suspects = [weight for weight in suspects if not _changes(call, weight, draw)]
                if not suspects or not _is_random(call):
                    break
            for weight in suspects:
                inert.setdefault(weight.title, []).append(mode)
        rest = [weight for weight in found if weight.title not in inert]
        for weight in _lost_without_gradients(call, rest):
            inert.setdefault(weight.title, []).append("evaluation without gradients")
    if inert:
        listed = "; ".join(
            f"{name or type(module).__name__!r} (in {', '.join(modes)})" for name, modes in inert.items()
        )
        raise InertAdapterError(
            f"Adapters without any effect on the output of this {type(module).__name__}: {listed}. Leave these out "
            "with exclude_modules; or, where a module reads such a weight, name the parameter in target_parameters."
        )


@torch.no_grad()
def _stir(module: nn.Module, found: list[AdaptedWeight]) -> None:
    """Perturb the active adapters and what else is trained, since a head that starts at zero would hide later effects.

    Active adapters that are frozen are verified as well, so their B gets a gradient meanwhile.
    """
    torch.manual_seed(0)
    frozen = [value for weight in found if not weight.is_trained for value in weight.adapter.parameters()]
    for parameter in [*adapter_parameters(module), *frozen]:
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    for weight in found:
        _b(weight).requires_grad_(True)


@torch.no_grad()
def _is_random(call: Callable[[], list[Tensor]]) -> bool:
    outputs = []
    for seed in range(2):
        torch.manual_seed(seed)
        outputs.append(call())
    return not all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def _without_gradient(
    call: Callable[[], list[Tensor]], suspects: list[AdaptedWeight], seed: int
) -> list[AdaptedWeight]:
    """Return the adapters whose B gets no gradient, or a zero gradient, from a random function of the output."""
    if not suspects:
        return []
    gradients = _gradients(call, suspects, seed)
    return [
        weight for weight, gradient in zip(suspects, gradients, strict=True) if gradient is None or not gradient.any()
    ]


def _gradients(call: Callable[[], list[Tensor]], among: list[AdaptedWeight], seed: int) -> list[Tensor | None]:
    torch.manual_seed(seed)
    outputs = [output for output in call() if output.requires_grad]
    if not outputs:
        return [None] * len(among)
    doubles = [output.double() for output in outputs]
    random = [torch.randn_like(output) for output in doubles]
    return list(torch.autograd.grad(doubles, [_b(weight) for weight in among], random, allow_unused=True))


@torch.no_grad()
def _changes(call: Callable[[], list[Tensor]], weight: AdaptedWeight, seed: int) -> bool:
    """Return whether a large change of B changes the output, which a zero gradient at one point does not rule out."""
    b = _b(weight)
    kept = b.clone()
    torch.manual_seed(seed)
    before = call()
    b.add_(torch.randn_like(b))
    torch.manual_seed(seed)
    after = call()
    b.copy_(kept)
    return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _lost_without_gradients(call: Callable[[], list[Tensor]], live: list[AdaptedWeight]) -> list[AdaptedWeight]:
    """Return the adapters without effect in evaluation without gradients, where PyTorch may use fast paths.

    Each B is changed such that all adapters affect the output about equally. A missing adapter then shows in the total
    effect, and only in this case are the adapters checked one by one.
    """
    if not live:
        return []
    with torch.enable_grad():
        gradients = _gradients(call, live, 0)
    with torch.no_grad():
        for weight, gradient in zip(live, gradients, strict=True):
            norm = 0.0 if gradient is None else float(gradient.norm())
            if norm:
                assert gradient is not None
                _b(weight).add_(gradient / norm, alpha=min(0.1 / norm, 1.0))
        moved = call()
        with torch.enable_grad():
            with_gradients = [output.detach() for output in call()]
    scale = max(float(output.abs().max()) for output in moved) or 1.0
    apart = max(float((a - b).abs().max()) for a, b in zip(moved, with_gradients, strict=True))
    if apart <= 1e-4 * scale:
        return []
    return [weight for weight in live if not _changes(call, weight, 0)]


def _b(weight: AdaptedWeight) -> nn.Parameter:
    return weight.factors[1]


@contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    modes = {layer: layer.training for layer in module.modules()}
    state = module.state_dict(keep_vars=True)
    kept = {key: state[key].detach().clone() for key in adapter_state_dict(module)}
    trained = {key: state[key].requires_grad for key in kept}
    devices = {parameter.device for parameter in module.parameters() if parameter.is_cuda}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for key, value in kept.items():
            state[key].data.copy_(value)
            state[key].requires_grad_(trained[key])
        for layer, mode in modes.items():
            layer.training = mode


def _tensors(output: object) -> Iterator[Tensor]:
    """Return the floating-point tensors in an output."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from _tensors(getattr(output, field.name))
