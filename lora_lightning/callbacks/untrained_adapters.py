"""Says if adapters have no effect, and if training does not change them."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lora_lightning.callbacks.adapted_part import adapted_part
from lora_lightning.lora import adapted_weights, is_untrained
from lora_lightning.lora.sharding import full
from lora_lightning.wording import some_of


class UntrainedAdapters(Callback):
    """Says in `validate`, `test` and `predict` if adapters have no effect, and in `fit` if some are not trained.

    Args:
        verify: Whether to compare the adapters after the first epoch with those before.
    """

    def __init__(self, verify: bool = True) -> None:
        self._verify = verify
        self._adapted: nn.Module | None = None
        self._step = 0
        self._before: dict[str, Tensor] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._verify:
            self._adapted, self._step = adapted_part(pl_module), trainer.global_step
            self._before = {name: full(up.detach()).clone() for name, up in _last_factors(self._adapted).items()}

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._adapted is None:
            return
        before, adapted = self._before, self._adapted
        self._adapted, self._before = None, {}
        if trainer.global_step == self._step:
            return
        now = _last_factors(adapted)  # others may have been attached or activated since
        names = [
            name for name, old in before.items() if name in now and torch.equal(full(now[name]).to(old.device), old)
        ]
        if names:
            shown = [name or type(adapted).__name__ for name in names]
            rank_zero_warn(
                f"Training has not changed the adapters of {some_of(map(repr, shown))}: no gradient has reached them "
                "in the first epoch, or the learning rate was zero. If nothing calls these layers, leave them out with "
                "exclude_modules; verify=False turns this warning off."
            )

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            _say_if_untrained(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _say_if_untrained(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _say_if_untrained(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._adapted, self._before = None, {}


def _say_if_untrained(pl_module: LightningModule) -> None:
    if is_untrained(pl_module):
        rank_zero_info("The adapters are untrained and have no effect. Pass trained ones as ckpt_path.")


def _last_factors(adapted: nn.Module) -> dict[str, nn.Parameter]:
    """Return B of each trained adapter, or A if that alone is trained, by the name of the weight."""
    found = {}
    for each in adapted_weights(adapted):
        if each.is_trained:
            a, b = each.factors
            found[each.title] = a if "lora_B" in each.adapter.fixed else b
    return found
