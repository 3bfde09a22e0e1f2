"""Saves the configuration of a run so that every command can read it later."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

_OF_ONE_COMMAND = ("return_predictions",)


class SaveSharedConfig(SaveConfigCallback):
    """Save the run's configuration without settings that one command alone has.

    Args:
        parser: See `SaveConfigCallback`.
        config: See `SaveConfigCallback`.
        options: Those of `SaveConfigCallback`.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **options: Any) -> None:
        shared: Namespace = config.clone()
        for name in _OF_ONE_COMMAND:
            shared.pop(name, None)
        if shared.get("weights_only") is None:
            shared.pop("weights_only", None)
        super().__init__(parser, shared, **options)
