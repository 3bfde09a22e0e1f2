"""Chooses ranks and initial values from the inputs of the layers: EVA (https://arxiv.org/abs/2410.07170).

The first principal components of the inputs of a layer become its A, so that A x keeps as much of x as a matrix of this
rank can. Ranks go where a further component explains most of the variance.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_lightning.lora.adaptation import attach_as_configured
from lora_lightning.lora.adapter import without_autocast
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.layers import LinearKind
from lora_lightning.lora.matching import exactly, pattern_of
from lora_lightning.lora.other_layers import TransposedLinearKind
from lora_lightning.lora.record import adapted_weights, unwrapped
from lora_lightning.lora.selection import candidates, select
from lora_lightning.lora.targets import Target
from lora_lightning.wording import some_of

_log = logging.getLogger("lora_lightning.lora")
_MOST = 2
"""A layer gets at most this multiple of its rank, as in PEFT."""
_EXACT = 256
"""Layers with at most this number of inputs keep all components, so that several batches are as one."""
_ITERATIONS = 4
"""Number of iterations of the randomized decomposition of larger matrices, as in PEFT."""


@dataclass(frozen=True)
class EVAStart:
    """Holds what EVA has found.

    Attributes:
        config: The configuration with the ranks that were found, as `rank_pattern`. Layers without any rank are no
            longer targets.
        vectors: The initial A by name of the adapted weight, on the CPU.
    """

    config: LoRAConfig
    vectors: Mapping[str, Tensor]

    @torch.no_grad()
    def attach(self, module: nn.Module, name: str = "default") -> list[str]:
        """Attach adapters with these ranks and initial values, and return the names as `attach` does."""
        names = attach_as_configured(module, self.config, name)
        for weight in adapted_weights(unwrapped(module), name):
            if weight.name in self.vectors:
                weight.adapter.lora_A.copy_(self.vectors[weight.name])
        return names


def eva(
    module: nn.Module,
    config: LoRAConfig,
    batches: Iterable[object],
    forward: Callable[[object], object] | None = None,
) -> EVAStart:
    """Find ranks and initial values for linear layers from the inputs that they get for a few batches.

    The sum of the ranks is that of `config`. They are redistributed to the components that explain most of the variance
    of the inputs of their layers, at most twice the rank of `config` for each layer. A layer without any rank gets no
    adapter. Scales stay those of `config`. Other layers, such as convolutions, and layers that are not called keep
    their rank and get a random A, as in PEFT.

    The module is evaluated without gradients. Its modes and PyTorch's random states are afterwards as before. Inputs at
    positions where an `attention_mask` in the batch is zero are left out.

    Args:
        module: A module without adapters that are in effect.
        config: Selects the layers. Its ranks are the budget.
        batches: Inputs of the module. A mapping is passed as keyword arguments, a list or tuple as arguments.
        forward: What to call with each batch instead of the module.

    Raises:
        ValueError: For the reasons of `attach`, or if there are no batches.

    Example::

        lora.eva(net, lora.LoRAConfig(rank=4, init="eva"), batches).attach(net)
    """
    module = unwrapped(module)
    config = replace(config, init="eva")
    targets = select(module, config)
    found = {target.name: _Components(_kept(target)) for target in targets if _is_linear(target)}
    masks: list[Tensor | None] = [None]
    run, count = forward or partial(_call, module), 0
    with _evaluated(module), _watched(targets, found, masks):
        for batch in batches:
            masks[0] = _attention_mask(batch)
            run(batch)
            count += 1
    if not count:
        raise ValueError("init='eva' starts from the inputs of the layers, but there are no batches.")
    seen = [target for target in targets if target.name in found and found[target.name].count > 1]
    if unseen := [target.name or "root" for target in targets if target not in seen]:
        _log.warning(
            "init='eva' is for linear layers that are called. These keep their rank and get a random A: %s.",
            some_of(unseen),
        )
    ranks = _redistributed(seen, found)
    vectors = {name: found[name].leading(rank).cpu() for name, rank in ranks.items() if rank}
    return EVAStart(_with_ranks(module, config, targets, ranks), vectors)


class _Components:
    """Holds the principal components of vectors that come in batches (incremental SVD).

    The leading components of all vectors so far stand for them, scaled by their singular values. Each batch adds its
    own vectors, and one for the difference of the means.

    Args:
        kept: Number of components to keep. With that of the features, the result is that of all vectors at once.
    """

    def __init__(self, kept: int) -> None:
        self.kept, self.count = kept, 0
        self.mean = self.total = torch.zeros(())
        self.scaled = torch.zeros(0, 0)

    def add(self, vectors: Tensor) -> None:
        """Take note of vectors of shape (number, features)."""
        vectors = vectors.to(torch.float32)
        number, before = len(vectors), self.count
        if not number:
            return
        self.count += number
        mean = vectors.mean(0)
        shift = mean - self.mean.to(mean)
        centred = vectors - mean
        rows = [centred]
        if before:
            between = shift * (before * number / self.count) ** 0.5
            rows = [self.scaled, centred, between[None]]
            self.total = self.total + between.square().sum()
            self.mean = self.mean + shift * (number / self.count)
        else:
            self.mean = mean
        self.total = self.total.to(centred) + centred.square().sum()
        self.scaled = _leading(torch.cat(rows), self.kept)

    def explained(self, most: int) -> list[float]:
        """Return the share of the variance that each of the leading components explains."""
        shares = self.scaled[:most].square().sum(1) / self.total
        return [share for share in shares.tolist() if share > 0]  # not NaN, of inputs that are all the same

    def leading(self, number: int) -> Tensor:
        """Return components of length 1, whose largest entry is positive."""
        vectors: Tensor = functional.normalize(self.scaled[:number])
        return vectors * vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()


def _leading(matrix: Tensor, number: int) -> Tensor:
    """Return the leading right singular vectors times their singular values, as rows.

    Those of a large matrix are found by a randomized iteration (Halko et al. 2011, https://arxiv.org/abs/0909.4061,
    algorithm 4.4).
    """
    if min(matrix.shape) > max(_EXACT, number):
        start = torch.randn(matrix.shape[1], number, generator=torch.Generator().manual_seed(0))
        basis, _ = torch.linalg.qr(matrix @ start.to(matrix))
        for _ in range(_ITERATIONS):
            basis, _ = torch.linalg.qr(matrix.mT @ basis)
            basis, _ = torch.linalg.qr(matrix @ basis)
        matrix = basis.mT @ matrix
    _, values, vectors = torch.linalg.svd(matrix, full_matrices=False)
    scaled: Tensor = values[:, None] * vectors
    return scaled[:number]


def _most(target: Target) -> int:
    return min(_MOST * target.rank, *target.shape)


def _kept(target: Target) -> int:
    features = target.shape[1]
    return features if features <= _EXACT else min(2 * _most(target), features)


def _is_linear(target: Target) -> bool:
    return isinstance(target.kind, LinearKind | TransposedLinearKind)


def _redistributed(seen: Sequence[Target], found: Mapping[str, _Components]) -> dict[str, int]:
    """Return the ranks of the layers, whose sum is that of their targets unless fewer components explain anything."""
    shares = [(share, target.name) for target in seen for share in found[target.name].explained(_most(target))]
    shares.sort(key=lambda pair: -pair[0])  # of equal ones, those of the first layers go first
    ranks = dict.fromkeys((target.name for target in seen), 0)
    for _, name in shares[: sum(target.rank for target in seen)]:
        ranks[name] += 1
    return ranks


def _with_ranks(
    module: nn.Module, config: LoRAConfig, targets: Sequence[Target], ranks: Mapping[str, int]
) -> LoRAConfig:
    """Return a configuration of exactly these ranks, with the scales of before."""
    kept = [target for target in targets if ranks.get(target.name, 1)]
    requested = {target.name: ranks.get(target.name, config.rank_of(*target.names)) for target in kept}
    scales = {target.name: config.scaling_of(*target.names) for target in kept}
    alphas = {
        name: scale * (requested[name] ** 0.5 if config.use_rslora else requested[name])
        for name, scale in scales.items()
    }
    found = replace(config, rank_pattern=pattern_of(requested, config.rank))
    if any(found.scaling_of(*target.names) != scales[target.name] for target in kept):
        found = replace(found, alpha_pattern=pattern_of(alphas, None))
    if len(kept) < len(targets):
        without = [target.name for target in targets if target not in kept]
        _log.info("EVA finds no use for adapters of %s.", some_of(without))
        by_pattern = [target.name for target in kept if target.parameter and config.selects(*target.names)]
        names = [name for target in candidates(module, config).values() for name in target.names]
        found = replace(found, target_modules=exactly(by_pattern, names))
    return found


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Evaluate a module without gradients and without a trace in modes and random states."""
    modes = {child: child.training for child in module.modules()}
    devices = {parameter.device for parameter in module.parameters() if parameter.is_cuda}
    try:
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
            module.eval()
            yield
    finally:
        for child, mode in modes.items():
            child.training = mode


@contextmanager
def _watched(
    targets: Iterable[Target], found: Mapping[str, _Components], masks: Sequence[Tensor | None]
) -> Iterator[None]:
    """Collect the inputs of layers within this context."""

    def look(
        components: _Components, layer: nn.Module, arguments: tuple[object, ...], keywords: Mapping[str, object]
    ) -> None:
        inputs = arguments[0] if arguments else next(iter(keywords.values()))
        assert isinstance(inputs, Tensor)
        mask = masks[0]
        if mask is not None and inputs.shape[:-1] == mask.shape:
            inputs = inputs[mask.to(inputs.device, torch.bool)]
        with without_autocast(inputs):
            components.add(inputs.detach().reshape(-1, inputs.shape[-1]))

    hooks = [
        target.layer.register_forward_pre_hook(partial(look, found[target.name]), with_kwargs=True)
        for target in targets
        if target.name in found
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _call(module: nn.Module, batch: object) -> object:
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, list | tuple) else module(batch)


def _attention_mask(batch: object) -> Tensor | None:
    """Return the mask of the tokens in a batch, if there is one anywhere in it."""
    if isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
        parts: Iterable[object] = batch.values()
        if isinstance(mask, Tensor):
            return mask
    else:
        parts = batch if isinstance(batch, list | tuple) else ()
    return next((mask for part in parts if (mask := _attention_mask(part)) is not None), None)
