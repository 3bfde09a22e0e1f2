"""Orders the labels of texts: as the head of the model has them, or sorted."""

from __future__ import annotations

import re
from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lora_lightning.backbone_facts import backbone_facts
from lora_lightning.wording import some_of

_WHOLE_NUMBER = re.compile(r"[+-]?\d+")
_PLACEHOLDER = re.compile(r"LABEL_\d+")


def head_labels(modules: Iterable[nn.Module]) -> list[str]:
    """Return the names of the classes of a trained head in the order of its outputs, or an empty list.

    They are `id2label` of a configuration of the transformers library. The names of a new head, and the placeholders
    `LABEL_0`, `LABEL_1`, ..., say nothing about the data.

    Args:
        modules: The modules of the model, from the outside in.
    """
    for module in modules:
        facts = backbone_facts(module)
        if facts is not None and facts.new_head:
            return []
        found = getattr(getattr(module, "config", None), "id2label", None)
        if isinstance(found, dict) and found:
            names = [str(found[key]) for key in sorted(found, key=int)]
            return [] if any(map(_PLACEHOLDER.fullmatch, names)) else names
    return []


def ordered_labels(labels: AbstractSet[str], head: list[str]) -> tuple[list[str], str]:
    """Return the names of the classes in the order of their indices, and a description of this order.

    Args:
        labels: The labels of the training data.
        head: The names of the classes of a trained head, see `head_labels`.
    """
    if labels <= set(head):
        return head, "in the order of the head"
    spelled = {label.casefold(): label for label in labels}
    if len(spelled) == len(labels) and spelled.keys() <= {name.casefold() for name in head}:
        return [spelled.get(name.casefold(), name) for name in head], "in the order of the head"
    if all(map(_WHOLE_NUMBER.fullmatch, labels)):
        return sorted(labels, key=lambda label: (int(label), label)), "in numeric order"
    if head:
        rank_zero_warn(
            f"The classes of the head ({some_of(head)}) are not the labels of the data ({some_of(sorted(labels))}), "
            "which are sorted instead. Set classes of TextDataModule to the labels in the order of the head."
        )
    return sorted(labels), "sorted"
