"""Lets an adapted model load the states of its own checkpoints, as many libraries do with the best one after `fit`."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lora_lightning.checkpoints.packed_layers import packed_keys
from lora_lightning.lora import backbone_of, detach, is_adapted
from lora_lightning.lora.state import adapter_keys, saved_keys


class OwnStates:
    """Completes what `load_state_dict` of an adapted model is given, as long as it has adapters.

    A checkpoint of adapters has no base: that of the model is taken, also if loading is strict. A full checkpoint has
    the weights of the plain, merged model: the adapters are removed, so that the model becomes plain. This happens
    after a run alone, since the optimizer of a run has the adapters.

    Args:
        pl_module: The adapted model.
        is_full: Whether its checkpoints are full.
    """

    def __init__(self, pl_module: LightningModule, is_full: bool) -> None:
        self.is_full = is_full
        self._id: int = pl_module.register_load_state_dict_pre_hook(self).id  # type: ignore[no-untyped-call]

    def __call__(self, pl_module: LightningModule, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Change the state that is about to be loaded, or the model."""
        if not is_adapted(pl_module):
            self._leave(pl_module)
        if prefix or not is_adapted(pl_module):
            return
        live, adapters = pl_module.state_dict(), adapter_keys(pl_module)
        if adapters | saved_keys(pl_module) <= state.keys():
            missing = live.keys() - state.keys() - packed_keys(pl_module)
            state.update({key: live[key] for key in missing})
        elif self.is_full and not adapters & state.keys() and live.keys() - adapters <= state.keys():
            trainer = pl_module._trainer
            if trainer is None or trainer.state.status != "running":
                self._leave(pl_module)
                detach(backbone_of(pl_module))
                rank_zero_info("The model loads weights of a full checkpoint. It is plain now, without adapters.")

    def _leave(self, pl_module: LightningModule) -> None:
        """Remove this hook without a change to the collection of hooks, which PyTorch is going through."""
        hooks = pl_module._load_state_dict_pre_hooks
        pl_module._load_state_dict_pre_hooks = OrderedDict(
            (key, hook) for key, hook in hooks.items() if key != self._id
        )
