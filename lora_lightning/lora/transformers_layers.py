"""Adapts layers of the transformers library that differ from PyTorch's, and defines `target_modules="all"` for its models."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from lora_lightning.lora.config import LoRAConfig, Names
from lora_lightning.lora.embedding import LoRAEmbedding
from lora_lightning.lora.layers import LAYERS, LoRALinear
from lora_lightning.lora.model import EXTENSIONS, AdaptedWeight
from lora_lightning.wording import some_of


class LoRATransposedLinear(LoRALinear):
    """Adapts `Conv1D`, a linear layer whose weight has the shape (in, out)."""

    lora_transposed = True

    def lora_base(self, input: Tensor) -> Tensor:
        weight, bias = cast(Tensor, self._parameters["weight"]), cast(Tensor, self.bias)
        y = torch.addmm(bias, input.view(-1, input.shape[-1]), weight)
        return y.view(*input.shape[:-1], weight.shape[1])


class LoRAFalconLinear(LoRALinear):
    """Adapts Falcon's linear layer, which adds the bias in a separate operation."""

    def lora_base(self, input: Tensor) -> Tensor:
        y = input @ cast(Tensor, self._parameters["weight"]).T
        return y if self.bias is None else y + cast(Tensor, self.bias)


class LoRAScaledEmbedding(LoRAEmbedding):
    """Adapts an embedding that multiplies its output by `embed_scale`, as in Gemma and BART."""

    def lora_base(self, input: Tensor) -> Tensor:
        return super().lora_base(input) * self._lora_scale()

    def lora_path(self, input: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return super().lora_path(input, a, b) * self._lora_scale()

    def _lora_scale(self) -> Tensor | float:
        scale, weight = cast("Tensor | float", self.embed_scale), cast(Tensor, self._parameters["weight"])
        return scale.to(weight.dtype) if isinstance(scale, Tensor) else scale


_SCALED = (
    "Bart BigBirdPegasus BioGpt Blenderbot DiffusionGemmaText EmbeddingGemma2Text Gemma2Text Gemma3Text Gemma3nText GemmaText "
    "Gemma4Text Gemma4UnifiedText M2M100 MBart MiniCPM3 NllbMoe PLBart PPFormulaNet PegasusX SeamlessM4T SeamlessM4Tv2 "
    "T5Gemma2Text TrOCR VaultGemmaText XGLM"
)
LAYERS["transformers", "Conv1D"] = LoRATransposedLinear
LAYERS["transformers", "FalconLinear"] = LoRAFalconLinear
LAYERS.update({("transformers", f"{name}ScaledWordEmbedding"): LoRAScaledEmbedding for name in _SCALED.split()})


def left_out_of_all(hosts: Iterable[nn.Module], known: Mapping[str, AdaptedWeight], config: LoRAConfig) -> set[str]:
    """Return the weights that `target_modules="all"` excludes in models of the transformers library: all but PEFT's `all-linear`.

    These are the non-linear layers and the output head. A log line names them.

    Args:
        hosts: The models.
        known: The weights that can be adapted, by name.
        config: Its `target_parameters` are not excluded.
    """
    inside: set[nn.Module] = set()
    heads: set[nn.Module | None] = set()
    for host in hosts:
        if any(cls.__module__.startswith("transformers.") for cls in type(host).__mro__):
            inside |= set(host.modules())
            heads.add(host.get_output_embeddings())  # type: ignore[operator]
    by_name = Names(config.target_parameters)
    left_out = [
        name
        for name, each in known.items()
        if each.layer in inside
        and (each.layer in heads or not (isinstance(each.layer, nn.Linear) or issubclass(each.kind, LoRALinear)))
        and config.selects(*each.names)
        and not by_name(name)
    ]
    if left_out:
        logging.getLogger("lora_lightning.lora").warning(
            "target_modules='all' selects the linear layers of a transformers model and excludes %s. Name these layers to adapt them.",
            some_of(left_out),
        )
    return set(left_out)


EXTENSIONS["all"] = left_out_of_all
