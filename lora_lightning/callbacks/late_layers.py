"""Attaches adapters as soon as the layers of a `LightningModule` exist."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from lora_lightning.lightning_packages import is_a, own_class
from lora_lightning.lora import disabled


def convert_layers(trainer: Trainer, pl_module: LightningModule) -> None:
    """Let `BitsandbytesPrecision` replace the linear layers now. Otherwise it would do so after they were adapted."""
    precision = trainer.strategy.precision_plugin
    if is_a(precision, BitsandbytesPrecision):
        precision.convert_module(pl_module)


class AfterLayers:
    """Attaches adapters as soon as the layers of a module exist, and settles them after the layers are distributed.

    The last hook in which a module can create layers is `configure_model`, or else `setup`. Both run after the `setup` of callbacks, so the
    hook is replaced on the module until it has run. A module without these hooks already has its layers. If `configure_model`
    distributes existing layers, the adapters are attached before it, so that they are distributed as well.

    Args:
        trainer: The trainer that runs the module.
        pl_module: The module.
        attach: A function that attaches the adapters if there are none.
        settle: A function that is called afterwards, at the end of the last hook.
    """

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, attach: Callable[[], None], settle: Callable[[], None]
    ) -> None:
        self._pl_module = pl_module
        parent = own_class(pl_module, LightningModule)
        self.hook = next(
            (name for name in ("configure_model", "setup") if is_overridden(name, pl_module, parent)), None
        )
        before = is_a(trainer.strategy, ModelParallelStrategy) and any(True for _ in pl_module.parameters())
        if before or self.hook is None:
            attach()
        if self.hook is None:
            settle()
            return
        self._own = vars(pl_module).get(self.hook)
        method = getattr(pl_module, self.hook)

        @wraps(method)
        def then(*args: Any, **kwargs: Any) -> None:
            self.remove()
            with disabled(pl_module):  # tensor parallelism expects `layer.weight` to be the parameter
                method(*args, **kwargs)
            if not before:
                attach()
            settle()

        setattr(pl_module, self.hook, then)

    def remove(self) -> None:
        """Restore the hook of the module if it did not run."""
        if self.hook is not None:
            delattr(self._pl_module, self.hook)
            if self._own is not None:
                setattr(self._pl_module, self.hook, self._own)
            self.hook = None
