"""Defines what a backbone brings along besides its weights: new layers, preprocessing and tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class BackboneFacts:
    """Describes a backbone without being a part of it.

    Neither the state dict nor the submodules of the network contain it, even if the preprocessing is a module.
    """

    new_head: tuple[str, ...] = ()
    """Names of layers that are not in the weights and have to be trained in full."""
    preprocessing: Callable[[Any], Any] | None = None
    """The transform from an RGB image to a tensor of shape (C, H, W), for a backbone of images."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """The tokenizer, for a backbone of texts."""


@runtime_checkable
class HasBackboneFacts(Protocol):
    """A network that describes itself, as `image_backbone` and `text_backbone` return it."""

    backbone_facts: BackboneFacts


def backbone_facts(network: object) -> BackboneFacts | None:
    """Return the facts about a network, or `None` if it has none."""
    return network.backbone_facts if isinstance(network, HasBackboneFacts) else None


def set_backbone_facts(network: nn.Module, facts: BackboneFacts) -> None:
    """Set the facts about a network. Its copies have them, too."""
    cast(HasBackboneFacts, network).backbone_facts = facts
