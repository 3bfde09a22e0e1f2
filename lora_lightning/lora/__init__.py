"""Low-rank adaptation in pure PyTorch.

Read `config.py`, `layers.py`, `adapter.py`; then, as needed, `svd.py`, `peft.py` and `frozen.py`.
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
    merge,
    merged,
)
from lora_lightning.lora.attached import attachment
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.extract import extract
from lora_lightning.lora.layers import LoRALinear
from lora_lightning.lora.peft import load_adapter, save_adapter
from lora_lightning.lora.svd import low_rank

__all__ = [
    "LoRAConfig",
    "LoRALinear",
    "adapted_layers",
    "adapter_parameters",
    "adapter_state",
    "attach",
    "attachment",
    "detach",
    "disabled",
    "extract",
    "fingerprint",
    "is_adapted",
    "is_adapter_key",
    "load_adapter",
    "low_rank",
    "merge",
    "merged",
    "save_adapter",
]
