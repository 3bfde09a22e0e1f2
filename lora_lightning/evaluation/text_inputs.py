"""Finds out whether a model reads texts, and whether it predicts the following token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_lightning.evaluation.found import TARGET_NAMES, entries
from lora_lightning.evaluation.reading import NO_TARGET
from lora_lightning.evaluation.recorded_calls import Call

_TEXT_NAMES = ("input_ids", "inputs_embeds", "attention_mask", "decoder_input_ids")


class TextInputs:
    """Looks at the arguments of calls."""

    def __init__(self) -> None:
        self._kinds: dict[nn.Module, tuple[bool, bool]] = {}

    def look(self, call: Call, targets: Tensor) -> tuple[bool, bool]:
        """Return whether the inputs are token ids, and whether the targets are the following tokens.

        They are if the targets equal the input, except where they are -100, since a model that predicts the token of
        the same position would have it as its input; and if a causal model of the transformers library gets `labels`,
        which its loss shifts. They are not in models with an encoder and a decoder, which shift the decoder's input,
        and in masked language models.

        Args:
            call: The call.
            targets: The targets.
        """
        if targets.dim() != 2:
            return False, False
        arguments = dict(_arguments((call.args, call.kwargs)))
        ids = [
            each
            for name, each in arguments.items()
            if isinstance(each, Tensor) and _is_ids(each) and not _is_target(name) and each.shape == targets.shape
        ]
        is_text = bool(ids) or any(name.rpartition(".")[2] in _TEXT_NAMES for name in arguments)
        if not is_text or targets.is_floating_point():
            return is_text, False
        is_causal, is_other = self._kind(call.module)
        if is_other:
            return True, False
        has_labels = any(name.rpartition(".")[2] == "labels" for name in arguments)
        ignored = targets == NO_TARGET
        return True, (is_causal and has_labels) or any(bool(((each == targets) | ignored).all()) for each in ids)

    def _kind(self, module: nn.Module) -> tuple[bool, bool]:
        """Return whether a module contains a causal language model, and whether it contains another language model."""
        if module not in self._kinds:
            modules = list(module.modules())
            names = [type(each).__name__ for each in modules]
            is_causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
            has_decoder = any(
                getattr(getattr(each, "config", None), "is_encoder_decoder", False) is True for each in modules
            )
            self._kinds[module] = is_causal, has_decoder or any("MaskedLM" in name for name in names)
        return self._kinds[module]


def _arguments(thing: object, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    for name, value in entries(thing):
        yield f"{prefix}{name}", value
        if depth < 3 and isinstance(value, Mapping | tuple | list):
            yield from _arguments(value, f"{prefix}{name}.", depth + 1)


def _is_target(name: str) -> bool:
    return name.rpartition(".")[2] in TARGET_NAMES


def _is_ids(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.int32) and tensor.dim() == 2
