"""Attaches adapters as soon as the layers of a `LightningModule` exist."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lora_lightning.lightning_packages import is_a, own_class
from lora_lightning.lora import bare


def convert_layers(trainer: Trainer, pl_module: LightningModule) -> None:
    """Let `BitsandbytesPrecision` replace the linear layers now. Otherwise it would do so after they were adapted."""
    precision = trainer.strategy.precision_plugin
    if is_a(precision, BitsandbytesPrecision):
        precision.convert_module(pl_module)


def _is_sharded(module: nn.Module) -> bool:
    return any(isinstance(child, FSDPModule) for child in module.modules())


class AfterLayers:
    """Attaches adapters as soon as the layers of a module exist, and after `configure_model` has distributed them.

    The last hook in which a module can create layers is `configure_model`, or else `setup`. Both run after the `setup`
    of callbacks, so the hook is replaced on the module until the training starts or the run ends. A module without
    these hooks already has its layers. Adapters that are there already are set aside while `configure_model`
    distributes the layers, since `parallelize_module` replaces all parameters.

    Args:
        trainer: The trainer that runs the module.
        pl_module: The module.
        attach: A function that attaches the adapters if there are none.
        prepare: A function that is called afterwards, at the end of the last hook.
    """

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, attach: Callable[[], None], prepare: Callable[[], None]
    ) -> None:
        self._pl_module, self._is_installed = pl_module, False
        parent = own_class(pl_module, LightningModule)
        self.hook = next(
            (name for name in ("configure_model", "setup") if is_overridden(name, pl_module, parent)), None
        )
        distributes = is_a(trainer.strategy, ModelParallelStrategy)
        if self.hook is None:
            attach()
            prepare()
            return
        # No hook of a callback runs between configure_model and configure_optimizers:
        # https://github.com/Lightning-AI/pytorch-lightning/issues/19658
        self._own = vars(pl_module).get(self.hook)
        method = getattr(pl_module, self.hook)

        @wraps(method)
        def then(*args: Any, **kwargs: Any) -> None:
            self.remove()
            with bare(pl_module) if distributes and not _is_sharded(pl_module) else nullcontext():
                method(*args, **kwargs)
            attach()
            prepare()
            self._install(then)  # since WeightAveraging calls configure_model once more

        self._install(then)

    def _install(self, hook: Callable[..., None]) -> None:
        assert self.hook is not None
        self._is_installed = True
        setattr(self._pl_module, self.hook, hook)

    def remove(self) -> None:
        """Restore the hook of the module."""
        if self.hook is not None and self._is_installed:
            self._is_installed = False
            delattr(self._pl_module, self.hook)
            if self._own is not None:
                setattr(self._pl_module, self.hook, self._own)
