"""Modules that read the weights of their layers: PEFT ignores adapters there, and their folders say so."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lora_lightning import LoRAConfig, load_adapter, save_adapter
from lora_lightning.lora import attach
from tests.helpers import stir

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of PEFT's dependencies, while they are imported
    import peft
    import transformers

# PEFT 0.21 asks transformers 5.24 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SPEECH: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
SPACE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 64}


def wavlm() -> nn.Module:
    return transformers.WavLMModel(transformers.WavLMConfig(**SPEECH))


def speaker() -> nn.Module:
    sizes: dict[str, Any] = {
        "tdnn_dim": (8, 8),
        "tdnn_kernel": (3, 1),
        "tdnn_dilation": (1, 1),
        "xvector_output_dim": 8,
    }
    return transformers.Wav2Vec2ForXVector(transformers.Wav2Vec2Config(**SPEECH, **sizes))


def jamba() -> nn.Module:
    experts: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1, "use_mamba_kernels": False}
    layers = {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
    return transformers.JambaModel(transformers.JambaConfig(**SPACE | layers, **heads, **experts, mamba_d_state=4))


def mobile() -> nn.Module:
    sizes = {"intra_bottleneck_size": 8, "embedding_size": 8, "intermediate_size": 32, "num_attention_heads": 2}
    return transformers.MobileBertForMaskedLM(transformers.MobileBertConfig(**SPACE, **sizes))


def video() -> nn.Module:
    return torchvision.models.video.SwinTransformer3d([2, 4, 4], 8, [1, 1], [2, 2], [2, 4, 4], num_classes=3)


def segments() -> nn.Module:
    from transformers.models.detr.modeling_detr import DetrMHAttentionMap

    return DetrMHAttentionMap(16, 2)


def tokens() -> tuple[Tensor, ...]:
    return (torch.randint(3, 60, (2, 7)),)


def sound() -> tuple[Tensor, ...]:
    return (torch.randn(2, 2000),)


READERS: dict[str, tuple[Callable[[], nn.Module], str, Callable[[], tuple[Tensor, ...]]]] = {
    "WavLM, query": (wavlm, "q_proj", sound),
    "WavLM, output": (wavlm, "out_proj", sound),
    "speakers": (speaker, "kernel", sound),
    "Mamba": (lambda: transformers.MambaModel(transformers.MambaConfig(**SPACE, state_size=4)), "dt_proj", tokens),
    "Jamba": (jamba, "dt_proj", tokens),
    "MobileBERT's output head": (mobile, "predictions.dense", tokens),
    "Swin for videos": (video, "attn.qkv", lambda: (torch.randn(2, 3, 4, 16, 16),)),
    "DETR's segments": (segments, "k_proj", lambda: (torch.randn(2, 3, 16), torch.randn(2, 16, 4, 4))),
}


def output(net: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        found = net.eval()(*inputs)
    return found if isinstance(found, Tensor) else found[0]


@pytest.mark.filterwarnings("ignore:Detected LoRA on TDNNLayer:UserWarning")  # the transformers library says it, too
@pytest.mark.parametrize("case", READERS)
def test_adapters_that_peft_ignores_are_kept_from_it_and_work_here(case: str, tmp_path: Path) -> None:
    make, target, make_inputs = READERS[case]
    torch.manual_seed(0)
    net, inputs = make(), make_inputs()
    for parameter in net.parameters():
        if parameter.dim() > 1:  # at first, some weights are so small that adapters next to them change nothing
            nn.init.normal_(parameter, std=0.3)
    base = copy.deepcopy(net)
    attach(net, LoRAConfig(rank=2, target_modules=[target]))
    stir(net, 1.0)
    save_adapter(net, tmp_path)
    adapted, before = output(net, inputs), output(base, inputs)
    assert not torch.allclose(adapted, before, rtol=0.01, atol=0.01)
    other = copy.deepcopy(base)
    load_adapter(other, tmp_path)
    assert torch.equal(output(other, inputs), adapted)

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA_LIGHTNING"
    if target == "dt_proj":
        return  # the transformers library calls it in 5.10, and reads its weight in 5.24
    del config["bypass"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA", "target_parameters": None}))
    theirs = output(peft.PeftModel.from_pretrained(base, tmp_path), inputs)
    assert (theirs - before).abs().max() < 0.01 * (adapted - before).abs().max()
