"""Finds out whether a model reads texts, and whether it predicts the following token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from typing_extensions import TypeIs

from lora_lightning.evaluation.found import TARGET_NAMES, entries
from lora_lightning.evaluation.reading import NO_TARGET, Batch
from lora_lightning.evaluation.recorded_calls import Call

_TEXT_NAMES = ("input_ids", "inputs_embeds", "attention_mask", "decoder_input_ids")


class TextInputs:
    """Looks at the arguments of calls."""

    def __init__(self) -> None:
        self._kinds: dict[nn.Module, tuple[bool, bool]] = {}

    def look(self, call: Call, batch: Batch) -> Batch:
        """Return a batch with what the arguments of a call say about its targets.

        The targets are the following tokens if they equal the input, except where they are -100, since a model that
        predicts the token of the same position would have it as its input; and if a causal model of the transformers
        library gets `labels`, which its loss shifts. They are not in models with an encoder and a decoder, which shift
        the decoder's input, and in masked language models.

        Args:
            call: The call.
            batch: The batch.
        """
        targets = batch.targets
        if targets.dim() != 2:
            return batch
        arguments = [(name.rpartition(".")[2], value) for name, value in _arguments((call.args, call.kwargs))]
        ids = [each for name, each in arguments if name not in TARGET_NAMES and _is_ids(each, targets)]
        names = {name for name, _ in arguments}
        is_text = bool(ids) or not names.isdisjoint(_TEXT_NAMES)
        found = replace(batch, is_text=is_text, is_per_token=bool(ids))
        if not is_text or targets.is_floating_point():
            return found
        is_causal, is_other = self._kind(call.module)
        equals = any(bool(((each == targets) | (targets == NO_TARGET)).all()) for each in ids)
        return replace(found, is_next_token=not is_other and (equals or (is_causal and "labels" in names)))

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


def _is_ids(value: object, targets: Tensor) -> TypeIs[Tensor]:
    is_whole = isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)
    return is_whole and isinstance(value, Tensor) and value.shape == targets.shape
