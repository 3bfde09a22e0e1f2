"""Finds the adapters that PEFT would compute differently or ignore, so that their folders can say so."""

from __future__ import annotations

import sys

from torch import nn

from lora_lightning.lora import AdaptedWeight, adapted_weights
from lora_lightning.lora.adapter import layers_of
from lora_lightning.lora.layers import Adapted
from lora_lightning.lora.other_layers import GeometricLinearKind
from lora_lightning.peft_format.by_name import is_by_name


def unknown_to_peft(module: nn.Module, name: str | None = None) -> list[str]:
    """Return the names of the weights whose adapters PEFT computes differently or ignores.

    PEFT drops the dilation and padding mode of a convolution (https://github.com/huggingface/peft/issues/3697), mixes
    the channels of its groups, and ignores adapters on weights that are read instead of called, or adds them twice
    (https://github.com/huggingface/peft/issues/3774). In some mixtures of experts from the transformers library, it
    treats linear layers as experts because experts had the same names in an older version, and drops their adapters.
    """
    experts, read = _taken_for_experts(module), _read_by_others(module)
    return [
        adapted.name
        for adapted in adapted_weights(module, name)
        if not _known_to_peft(adapted)
        or adapted.layer_name in read
        or (adapted.name.rpartition(".")[2] in experts and not is_by_name(adapted))
    ]


_READERS: dict[tuple[str, str], tuple[str, ...]] = {
    ("torchvision", "ShiftedWindowAttention"): ("qkv", "proj"),
    ("torchvision", "ShiftedWindowAttention3d"): ("qkv", "proj"),
    ("torchvision", "ShiftedWindowAttentionV2"): ("qkv", "proj"),
    ("timm", "Attention"): ("qkv",),
    ("timm", "EvaAttention"): ("qkv",),
    ("timm", "WindowAttention"): ("qkv",),
    ("clip", "AttentionPool2d"): ("q_proj", "k_proj", "v_proj", "c_proj"),
    ("open_clip", "AttentionPool2d"): ("q_proj", "k_proj", "v_proj", "c_proj"),
    ("fairseq", "MultiheadAttention"): ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("diffusers", "HunyuanDiTAttentionPool"): ("q_proj", "k_proj", "v_proj", "c_proj"),
    ("diffusers", "FirDownsample2D"): ("Conv2d_0",),
    ("diffusers", "FirUpsample2D"): ("Conv2d_0",),
    ("transformers", "ConditionalDetrMHAttentionMap"): ("k_proj",),
    ("transformers", "DabDetrMHAttentionMap"): ("k_linear",),
    ("transformers", "DetrMHAttentionMap"): ("k_proj",),
    ("transformers", "FalconH1Mixer"): ("out_proj",),
    ("transformers", "FalconMambaMixer"): ("x_proj", "dt_proj", "out_proj"),
    ("transformers", "JambaMambaMixer"): ("dt_proj",),
    ("transformers", "LongcatFlashTopkRouter"): ("classifier",),
    ("transformers", "Mamba2Mixer"): ("out_proj",),
    ("transformers", "MambaMixer"): ("x_proj", "dt_proj", "out_proj"),
    ("transformers", "MaskFormerDetrMHAttentionMap"): ("k_proj",),
    ("transformers", "MobileBertLMPredictionHead"): ("dense", "decoder"),
    ("transformers", "NemotronHMamba2Mixer"): ("out_proj",),
    ("transformers", "NeoMMEForMaskedLM"): ("unembedding_projection",),
    ("transformers", "TDNNLayer"): ("kernel",),
    ("transformers", "WavLMAttention"): ("q_proj", "k_proj", "v_proj", "out_proj"),
}
"""Children whose weights a class of these libraries reads, at least in some cases, instead of calling the children.

Names stand for classes of packages that may not be installed. A folder is written without inputs for the network, so
that this cannot be tried, and the code of a class alone does not tell such a reader from one that only looks at the
dtype of a weight, or computes a penalty from it. PEFT refuses some of these classes.
"""
_TORCH_READERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
}
"""The same for PyTorch's own classes."""


def _read_by_others(module: nn.Module) -> set[str]:
    """Return the names of layers whose weights other supported modules read."""
    return {
        f"{name}.{child}".lstrip(".")
        for name, layer in layers_of(module)
        for cls in type(layer).__mro__
        for child in _TORCH_READERS.get(cls) or _READERS.get((cls.__module__.split(".")[0], cls.__name__), ())
    }


def _known_to_peft(adapted: AdaptedWeight) -> bool:
    layer = adapted.layer
    if is_by_name(adapted):
        # PEFT wraps the module with the parameters, which must not be the root, and adapts them while it is called.
        is_called = isinstance(layer, Adapted) and layer.lora_plain.forward is not nn.Module.forward
        return bool(adapted.layer_name) and is_called and adapted.adapter.is_linear
    if adapted.kind.is_reader or not adapted.parameter or isinstance(adapted.kind, GeometricLinearKind):
        return False
    return not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) or _conv_is_plain(layer)


_OLD_NAMES_OF_EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


def _taken_for_experts(module: nn.Module) -> tuple[str, ...]:
    """Return the last components of the target names that PEFT renames.

    They are those of the table in the transformers library that PEFT uses.
    """
    library = sys.modules.get("transformers.conversion_mapping")
    patterns = {**getattr(library, "_MODEL_TO_CONVERSION_PATTERN", {}), "mixtral": "mixtral"}
    kind = getattr(getattr(module, "config", None), "model_type", None)
    return _OLD_NAMES_OF_EXPERTS.get(str(patterns.get(kind)), ())


def _conv_is_plain(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    """Return whether PEFT supports all arguments of this convolution."""
    return layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
