"""Defines `PrefixCache`, which computes the features of a frozen prefix once per sample."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from lora_lightning.feature_cache.frozen_prefix import (
    Forward,
    Like,
    NotCacheableError,
    Prefix,
    Step,
    copied,
    equal,
    find_prefix,
    placeholders,
    replaced,
    same_buffers,
    same_random_numbers,
)


@dataclass
class _Features:
    """Holds the features of batches of one size, with the same other arguments."""

    prefix: Prefix
    of_sample: dict[bytes, dict[Step, list[Tensor]]] = field(default_factory=dict)
    """For the digest of each sample, its row in every tensor that the kept steps returned."""
    outputs: dict[Step, Any] = field(default_factory=dict)
    """Descriptions of the outputs of the steps, without values."""

    def knows(self, digests: list[bytes]) -> bool:
        """Return whether the features of all these samples are stored."""
        complete = len(self.prefix.kept)
        return all(len(self.of_sample.get(digest, ())) == complete for digest in digests)


class PrefixCache:
    """Stores the outputs of the frozen prefix of a network for each sample, and skips the prefix if the sample occurs again.

    Samples are identified by their content (BLAKE2b), so their order may change. Features are only used in batches of the size in which
    they were computed, since kernels may round differently in others. Outputs and gradients are bitwise those without the cache. The
    cache applies to calls in training mode with gradients while `active`. If features cannot be stored, a warning says why, and the module
    computes everything as without the cache.

    Args:
        module: An adapted module. The first dimension of its input tensors is the batch.
        samples: Number of different samples, if known. The cache ends if there are more.

    Example::

        cache = PrefixCache(net, samples=len(dataset))
        cache.active = True
        loss = net(images).sum()  # again with the same images: without the prefix
        cache.remove()
    """

    def __init__(self, module: nn.Module, samples: int | None = None) -> None:
        self.module = module
        self.samples = samples
        self.active = False
        self._features: dict[tuple[Any, ...], _Features] = {}
        self._seen: set[bytes] = set()
        self._plan = ExitStack()
        self._probing = False
        self._ended = False
        self._hooks = [
            module.register_forward_pre_hook(self._begin, with_kwargs=True),
            module.register_forward_hook(self._end, always_call=True),
        ]

    def remove(self) -> None:
        """Restore the module and delete all features."""
        for hook in self._hooks:
            hook.remove()
        self._plan.close()  # still open if the last call was interrupted
        self._features, self._seen = {}, set()

    @property
    def prefix(self) -> Prefix | None:
        """Return the skipped prefix, which is found with the first batch, or `None` before."""
        return next((features.prefix for features in self._features.values()), None)

    @property
    def bytes_per_sample(self) -> int:
        """Return the memory for the features of one sample, in bytes."""
        kept = [steps for features in self._features.values() for steps in features.of_sample.values()]
        return sum(row.numel() * row.element_size() for rows in kept[0].values() for row in rows) if kept else 0

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.active or self._ended or self._probing or not module.training or not torch.is_grad_enabled():
            return
        try:
            features, digests = self._features_of(args, kwargs)
        except NotCacheableError as reason:
            self._ended, self._features, self._seen = True, {}, set()
            warnings.warn(
                f"Features of the frozen prefix are not stored: {reason} Training continues without them.", stacklevel=2
            )
            return
        answer = (_replay if features.knows(digests) else _record)(features, digests)
        self._plan.enter_context(replaced(features.prefix.steps, answer))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._probing:
            self._plan.close()

    def _features_of(self, args: Any, kwargs: Any) -> tuple[_Features, list[bytes]]:
        """Return the features for calls like this one, and the digests of the samples."""
        tensors, key = _taken_apart(args, kwargs)
        digests = _digests(tensors)
        self._refuse_if_changing(digests)
        if key not in self._features:
            self._features[key] = _Features(self._find(args, kwargs, len(digests)))
        return self._features[key], digests

    def _refuse_if_changing(self, digests: list[bytes]) -> None:
        self._seen.update(digests)
        if self.samples is not None and len(self._seen) > self.samples:
            raise NotCacheableError(
                f"there are {len(self._seen)} different inputs, but only {self.samples} training samples, so inputs differ between epochs, as with "
                "augmentation."
            )

    def _find(self, args: Any, kwargs: Any, size: int) -> Prefix:
        """Find the prefix and check that each sample is independent of the others."""
        self._probing = True
        try:
            with same_buffers(self.module):
                prefix = find_prefix(self.module, lambda: self.module(*args, **kwargs), size)
                for step in prefix.steps:
                    step.output = None  # large, and not needed any more
                self._refuse_if_mixing(prefix, args, kwargs, size)
            return prefix
        finally:
            self._probing = False

    def _refuse_if_mixing(self, prefix: Prefix, args: Any, kwargs: Any, size: int) -> None:
        """Raise an error if the features of a sample depend on its position in the batch or on other samples."""
        rows = (torch.arange(size) // 2).flip(0).tolist()
        mixed = tree_map_only(Tensor, lambda value: value[rows], (args, kwargs))
        usual, other = self._kept_of(prefix, args, kwargs), self._kept_of(prefix, *mixed)
        for step, output in usual.items():
            if not equal(tree_map_only(Tensor, lambda value: value[rows], output), other[step]):
                raise NotCacheableError(
                    f"the output of {step.name!r} for a sample depends on the other samples in its batch, at least in its rounding."
                )

    def _kept_of(self, prefix: Prefix, args: Any, kwargs: Any) -> dict[Step, Any]:
        """Return the stored outputs for a batch."""
        outputs: dict[Step, Any] = {}

        def answer(step: Step, forward: Forward) -> Any:
            output = forward()
            if step.kept:
                outputs[step] = copied(output)
            if step is prefix.steps[-1]:
                raise _Reached  # later steps are not needed
            return output

        with suppress(_Reached), same_random_numbers(), replaced(prefix.steps, answer):
            self.module(*args, **kwargs)
        return outputs


class _Reached(Exception):
    pass


def _taken_apart(args: Any, kwargs: Any) -> tuple[list[Tensor], tuple[Any, ...]]:
    """Return the tensors of a call, and everything else that distinguishes two calls, starting with the batch size."""
    leaves, structure = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    sizes = {len(tensor) if tensor.dim() else None for tensor in tensors}
    if len(sizes) != 1 or None in sizes:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors) or "no tensors"
        raise NotCacheableError(
            f"the first dimension of all inputs has to be the number of samples, but their shapes are {shapes}."
        )
    others = tuple(repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor))
    layout = tuple((tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors)
    return tensors, (sizes.pop(), layout, str(structure), others)


def _digests(tensors: list[Tensor]) -> list[bytes]:
    """Return a digest (BLAKE2b) of each sample."""
    on_cpu = [tensor.detach().cpu().contiguous() for tensor in tensors]
    digests = []
    for row in range(len(on_cpu[0])):
        digest = hashlib.blake2b(digest_size=16)
        for tensor in on_cpu:
            digest.update(tensor[row].reshape(-1).view(torch.uint8).numpy().data)
        digests.append(digest.digest())
    return digests


def _record(features: _Features, digests: list[bytes]) -> Callable[[Step, Forward], Any]:
    """Compute the complete output and store the features."""

    def answer(step: Step, forward: Forward) -> Any:
        output = forward()
        features.outputs[step] = tree_map_only(Tensor, Like.of, output)
        if step.kept:
            for row, digest in enumerate(digests):
                rows = [leaf[row].detach().clone() for leaf in tree_leaves(output)]
                features.of_sample.setdefault(digest, {})[step] = rows
        return output

    return answer


def _replay(features: _Features, digests: list[bytes]) -> Callable[[Step, Forward], Any]:
    """Compute the output from the stored features."""

    def answer(step: Step, forward: Forward) -> Any:
        output = features.outputs[step]
        if not step.kept:
            return placeholders(output)
        leaves, structure = tree_flatten(output)
        batch = []
        for place, leaf in enumerate(leaves):
            values = leaf.empty()
            for row, digest in enumerate(digests):
                values[row] = features.of_sample[digest][step][place]
            batch.append(values)
        return tree_unflatten(batch, structure)

    return answer
