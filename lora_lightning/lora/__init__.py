"""Low-rank adaptation in pure PyTorch.

The core is `config.py`, `layers.py`, `freeze.py` and `model.py`. The other files extend it with layer types
(`transformers_layers.py`, `geometric_layers.py`, `weight_access.py`, `experts.py`), variants (`variants.py`), a faster forward pass
(`fused.py`), options of `attach` (`bypass.py`, `modules_to_save.py`, `named_adapters.py`), and functions on adapted modules.
"""

from lora_lightning.lora import (  # noqa: F401
    bitsandbytes_layers,
    bypass,
    convolution,
    embedding,
    experts,
    fused,
    geometric_layers,
    modules_to_save,
    transformers_layers,
    variants,
    weight_access,
)
from lora_lightning.lora.backbone import backbone_of
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.extract import extract_adapter
from lora_lightning.lora.fingerprint import base_fingerprint
from lora_lightning.lora.layers import LoRALayer, LoRALinear
from lora_lightning.lora.lora_plus import lora_plus_param_groups
from lora_lightning.lora.low_rank import low_rank_factors
from lora_lightning.lora.merging import disabled, merge, merged
from lora_lightning.lora.model import AdaptedWeight, adapted_weights, attach, detach, is_adapted
from lora_lightning.lora.named_adapters import adapter_names, add_weighted_adapter, set_adapter
from lora_lightning.lora.scaling import scale_adapter, scaled
from lora_lightning.lora.state import adapter_parameters, adapter_state_dict, is_untrained
from lora_lightning.lora.verify import InertAdapterError, verify_adapters

__all__ = [
    "AdaptedWeight",
    "InertAdapterError",
    "LoRAConfig",
    "LoRALayer",
    "LoRALinear",
    "adapted_weights",
    "adapter_names",
    "adapter_parameters",
    "adapter_state_dict",
    "add_weighted_adapter",
    "attach",
    "backbone_of",
    "base_fingerprint",
    "detach",
    "disabled",
    "extract_adapter",
    "is_adapted",
    "is_untrained",
    "lora_plus_param_groups",
    "low_rank_factors",
    "merge",
    "merged",
    "scale_adapter",
    "scaled",
    "set_adapter",
    "verify_adapters",
]
