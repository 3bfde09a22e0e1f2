"""Low-rank adaptation in pure PyTorch.

Read `adapter.py` (the update of one weight), `layers.py` (adapted layers) and `adaptation.py` (what is done to a
module) first. `record.py` says what is known of an adapted module, and `merging.py` writes updates into weights. The
kinds of layers are in `layers.py`, `readers.py`, `other_layers.py`, `packed.py` and `bypass.py`, and `registry.py`
lists them. Variants are in `variants.py`. `selection.py` finds the weights that a `LoRAConfig` selects.
"""

from lora_lightning.lora.adaptation import attach, delete_adapter, detach, disabled, set_adapter
from lora_lightning.lora.adapter import Adapter
from lora_lightning.lora.backbone import backbone_of
from lora_lightning.lora.combine import add_weighted_adapter
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.explained_variance import EVAStart, eva
from lora_lightning.lora.extract import extract_adapter
from lora_lightning.lora.fingerprint import base_fingerprint
from lora_lightning.lora.layers import bare
from lora_lightning.lora.lora_plus import lora_plus_param_groups
from lora_lightning.lora.low_rank import low_rank_factors
from lora_lightning.lora.merging import merge, merged
from lora_lightning.lora.record import adapted_weights, adapter_names, is_adapted
from lora_lightning.lora.scaling import scale_adapter, scaled
from lora_lightning.lora.state import adapter_parameters, adapter_state_dict, is_untrained
from lora_lightning.lora.targets import AdaptedWeight
from lora_lightning.lora.verify import InertAdapterError, verify_adapters

__all__ = [
    "AdaptedWeight",
    "Adapter",
    "EVAStart",
    "InertAdapterError",
    "LoRAConfig",
    "adapted_weights",
    "adapter_names",
    "adapter_parameters",
    "adapter_state_dict",
    "add_weighted_adapter",
    "attach",
    "backbone_of",
    "bare",
    "base_fingerprint",
    "delete_adapter",
    "detach",
    "disabled",
    "eva",
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
