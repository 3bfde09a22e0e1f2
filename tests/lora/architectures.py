"""Tiny random networks of 48 architectures of the transformers library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {
    **_IDS,
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_LLAMA = {**_BERT, "num_key_value_heads": 2}
_GEMMA = {**_LLAMA, "head_dim": 8}
_GPT = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DEEPSEEK = {
    **_BERT,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
_BART = {
    "vocab_size": 64,
    "d_model": 32,
    "max_position_embeddings": 64,
    **{f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in (("ffn_dim", 64), ("layers", 2))},
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
_VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
}
_SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": 3,
}
_OPT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
    **_IDS,
}
_NEO = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "max_position_embeddings": 64,
    "attention_types": [[["global", "local"], 1]],
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "hidden_sizes": [16, 32],
    "sr_ratios": [2, 1],
    "num_labels": 3,
    "num_attention_heads": [2, 4],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "mlp_ratios": [2, 2],
}
_WAV = {
    **_BERT,
    "conv_dim": [16, 16],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
    "num_labels": 3,
}
_XGLM = {
    "vocab_size": 64,
    "d_model": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "attention_heads": 4,
    "max_position_embeddings": 64,
}
_T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "d_kv": 8,
    "decoder_start_token_id": 0,
}
_DISTIL = {"vocab_size": 64, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "stablelm", "starcoder2", "olmo", "olmo2"), ("CausalLM", _LLAMA)),
    **dict.fromkeys(("cohere", "nemotron"), ("CausalLM", _LLAMA)),
    **dict.fromkeys(("qwen3", "gemma", "gemma2", "gemma3_text"), ("CausalLM", _GEMMA)),
    **dict.fromkeys(("phi", "phi3", "falcon", "gpt_neox"), ("CausalLM", _BERT)),
    "gpt2": ("CausalLM", _GPT),
    **{name: ("CausalLM", {**_GPT, "rotary_dim": 4}) for name in ("gptj", "codegen")},
    "gpt_neo": ("CausalLM", _NEO),
    "opt": ("CausalLM", _OPT),
    "bloom": ("CausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("CausalLM", {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "xglm": ("CausalLM", _XGLM),
    "mixtral": ("CausalLM", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("CausalLM", {**_LLAMA, **_EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("CausalLM", {**_GEMMA, **_EXPERTS}),
    "deepseek_v3": ("CausalLM", _DEEPSEEK),
    "mamba": ("CausalLM", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    **dict.fromkeys(("bert", "roberta", "deberta-v2", "mpnet"), ("SequenceClassification", _BERT)),
    "electra": ("SequenceClassification", {**_BERT, "embedding_size": 32}),
    "albert": ("SequenceClassification", {**_BERT, "embedding_size": 16}),
    "modernbert": ("SequenceClassification", {**_BERT, "cls_token_id": 1, "sep_token_id": 2}),
    "distilbert": ("SequenceClassification", _DISTIL),
    "t5": ("Seq2SeqLM", _T5),
    "bart": ("Seq2SeqLM", _BART),
    **dict.fromkeys(("vit", "beit", "dinov2"), ("ImageClassification", _VIT)),
    **dict.fromkeys(("swin", "swinv2"), ("ImageClassification", _SWIN)),
    "segformer": ("ImageClassification", _SEGFORMER),
    "convnext": ("ImageClassification", {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "num_labels": 3}),
    "wav2vec2": ("AudioClassification", _WAV),
}


def make(name: str, **changed: Any) -> nn.Module:
    """Returns the network, the same one every time; with other settings of its configuration if wanted."""
    import transformers

    task, arguments = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **(arguments | changed))
    network: nn.Module = getattr(transformers, f"AutoModelFor{task}").from_config(config)
    return network


def inputs(name: str) -> dict[str, Tensor]:
    """Returns a batch of two samples, with labels."""
    task, _ = ARCHITECTURES[name]
    generator = torch.Generator().manual_seed(1)
    classes = torch.tensor([0, 1])
    if task == "ImageClassification":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator), "labels": classes}
    if task == "AudioClassification":
        return {"input_values": torch.randn(2, 400, generator=generator), "labels": classes}
    ids = torch.randint(3, 64, (2, 8), generator=generator)
    return {"input_ids": ids, "labels": classes if task == "SequenceClassification" else ids}


def all_linear(network: nn.Module) -> list[str]:
    """Returns what PEFT's `target_modules="all-linear"` means here: linear layers, but for the output head."""
    import peft
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    config = _maybe_include_all_linear_layers(peft.LoraConfig(target_modules="all-linear"), network)
    return sorted(config.target_modules)
