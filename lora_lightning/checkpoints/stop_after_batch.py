"""Handles Ctrl-C such that a run can resume bitwise."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override


class StopAfterBatch(Callback):
    """Stops training after the current batch at the first Ctrl-C, and immediately at the second one.

    An interrupt in the middle of an optimizer step would leave a state that an uninterrupted run never has. The command
    line adds this callback to `fit` on a single device. Lightning itself handles SIGTERM in the same way.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._asked = False
            self._before = signal.signal(signal.SIGINT, self._ask)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self._restore()
        rank_zero_info("Stopping after this batch. Press Ctrl-C again to stop immediately.")

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
