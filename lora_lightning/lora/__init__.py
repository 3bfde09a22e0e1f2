"""Low-rank adaptation in pure PyTorch.

To read it: `config.py` (what to adapt, and how), `update.py` (an adapter), `layers.py` (layers that add its output to their
own), `effective.py` (weights that are read instead), `selection.py`, `attached.py` and `adapter.py` (the verbs). Then, as
needed: `several.py`, `verify.py`, `lora_plus.py`, `bypass.py`, `fused.py`, `svd.py` and `extract.py`, `frozen.py` (norm
layers), `frozen_prefix.py` and `prefix_cache.py`, `peft.py` and `peft_format.py` (folders).
"""

from lora_lightning.lora.adapter import (
    adapted_layers,
    adapter_parameters,
    adapter_state,
    attach,
    detach,
    disabled,
    fingerprint,
    is_adapted,
    is_adapter_key,
    is_fresh,
    merge,
    merged,
)
from lora_lightning.lora.attached import adapter_names, attachment, whole_keys
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.extract import extract
from lora_lightning.lora.layers import LoRALinear
from lora_lightning.lora.lora_plus import check_lr_ratio, lora_plus
from lora_lightning.lora.peft import load_adapter, save_adapter, trained_on
from lora_lightning.lora.selection import holder_of_parameters
from lora_lightning.lora.several import combine_adapters, switch_adapter
from lora_lightning.lora.svd import low_rank
from lora_lightning.lora.update import LowRankUpdate
from lora_lightning.lora.verify import InertAdapterError, verify

__all__ = [
    "InertAdapterError",
    "LoRAConfig",
    "LoRALinear",
    "LowRankUpdate",
    "adapted_layers",
    "adapter_names",
    "adapter_parameters",
    "adapter_state",
    "attach",
    "attachment",
    "check_lr_ratio",
    "combine_adapters",
    "detach",
    "disabled",
    "extract",
    "fingerprint",
    "holder_of_parameters",
    "is_adapted",
    "is_adapter_key",
    "is_fresh",
    "load_adapter",
    "lora_plus",
    "low_rank",
    "merge",
    "merged",
    "save_adapter",
    "switch_adapter",
    "trained_on",
    "verify",
    "whole_keys",
]
