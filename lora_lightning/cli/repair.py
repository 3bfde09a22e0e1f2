"""`lora-lightning repair`: the whole story on MNIST in one command."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from rich import get_console
from rich.markup import escape

from lora_lightning.callbacks import ConfusionReport, LoRAFinetuning
from lora_lightning.data import MNISTDataModule
from lora_lightning.data.mnist_files import Source
from lora_lightning.lora import base_fingerprint
from lora_lightning.models import Classifier, OneCycle, RichBoyNet
from lora_lightning.report import Confusion, Report
from lora_lightning.resume.checkpoints import load_base, newest_checkpoint

_PRETRAIN_BATCH_SIZE = 64
_ADAPT_BATCH_SIZE = 100
_LEARNING_RATE = 3e-3
_FOCUS_FRACTION = 0.45


def repair(
    base_checkpoint: str | os.PathLike[str] | None = None,
    focus: int | None = None,
    source: Source = "auto",
    data_dir: str | os.PathLike[str] = "data",
    rank: int = 1,
    steps: int = 600,
    seed: int = 0,
    log_dir: str | os.PathLike[str] = "logs",
    accelerator: str = "auto",
) -> int:
    """Pretrain an MLP on MNIST, find the digit it is poor at, repair that with LoRA, and prove what changed.

    The digit is chosen on validation data; the adapters train on batches of which 45 % show that digit and the rest all
    others, so that these are not forgotten; base and adapted model are compared on the test digits.

    Args:
        base_checkpoint: A trained model of configs/pretrain.yaml or configs/notebook/pretrain.yaml: a file, or a log
            folder, whose newest checkpoint is taken. Without it, a model is trained for one epoch.
        focus: The digit to repair. Without it, the one with the lowest recall on validation.
        source: "full" MNIST, the embedded "sample", or "auto": full where it is on disk or can be downloaded.
        data_dir: Where the full MNIST is or goes.
        rank: Rank of the adapters.
        steps: Training steps of the adapters, of 100 digits each.
        seed: Seed of the weights and of the order of the data.
        log_dir: Where logs go, as <log_dir>/repair/version_N.
        accelerator: "auto", "cpu", "gpu", ...

    Returns:
        The exit code: 0 if the base is bitwise unchanged, its counts come back when the adapters are off, the digit's
        errors fell and the accuracy did not; else 1.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: expected at least 1.")
    MNISTDataModule(focus=None if focus is None else [focus])  # refuses what is not a digit before the long work
    callback = LoRAFinetuning(rank=rank)  # and what is not a rank
    base_path = None if base_checkpoint is None else newest_checkpoint(base_checkpoint)
    with _quiet_lightning():
        seed_everything(seed, workers=True, verbose=False)
        data = _ready(MNISTDataModule(data_dir, source, batch_size=_PRETRAIN_BATCH_SIZE))
        _say(f"[bold]Data[/]: {escape(data.description())}.")
        runs = _Runs(Path(log_dir), accelerator)

        if base_path is None:
            _say("[bold]1. Base[/]: training the over-sized MLP on all ten digits for one epoch.")
            base_path = _pretrain(runs, data)
        else:
            _say(f"[bold]1. Base[/]: {escape(str(base_path))}")

        why = "as asked"
        if focus is None:
            validated = _count(runs, data, base_path, "validate")
            focus = validated.weakest()
            why = f"recall {validated.recall[focus]:.1%} on {validated.total:,} validation digits"
        _say(f"[bold]2. Weak digit[/]: {focus} ({why}).")

        _say(f"[bold]3. LoRA[/]: base frozen, {steps} steps with {_FOCUS_FRACTION:.0%} of each batch {focus}s.")
        callback.base_checkpoint = base_path
        replay = MNISTDataModule(
            data_dir, data.source, focus=[focus], focus_fraction=_FOCUS_FRACTION, batch_size=_ADAPT_BATCH_SIZE
        )
        report = _adapt_and_test(runs, _ready(replay), callback, steps)
        base_errors = _count(runs, data, base_path, "test").errors
    assert callback.adapted is not None
    assert report.base is not None
    unchanged = base_fingerprint(callback.adapted) == callback.base_fingerprint
    outcome = _Outcome(report.base, report.model, focus, base_errors, unchanged)
    _say(f"[bold]4. Outcome[/]: {outcome.in_words()}")
    _say(f"Trained: {callback.trained_parameters()}.")
    _say(f"Base bitwise unchanged: {'yes' if unchanged else 'NO'} (SHA-256 {callback.base_fingerprint[:12]}).")
    _say(f"Logs: {escape(str(runs.folder))}")
    _say(f"Adapter: {escape(str(callback.adapter_folder))}")
    broken = outcome.broken_promises()
    for promise in broken:
        _say(f"[bold red]Broken promise[/]: {promise}")
    return 1 if broken else 0


def _say(line: str) -> None:
    get_console().print(line, highlight=False, soft_wrap=True)


def _ready(data: MNISTDataModule) -> MNISTDataModule:
    """Download and read the data, so that their source and the number of batches are known."""
    data.prepare_data()
    data.setup("fit")
    return data


@dataclass(frozen=True)
class _Outcome:
    """Holds the counts of a repair, and tells whether its guarantees hold."""

    base: Confusion
    adapted: Confusion
    focus: int
    base_errors: list[int]
    base_unchanged: bool

    @property
    def before(self) -> int:
        return self.base.errors[self.focus]

    @property
    def after(self) -> int:
        return self.adapted.errors[self.focus]

    def in_words(self) -> str:
        others = sum(self.base.errors) - self.before, sum(self.adapted.errors) - self.after
        return (
            f"errors on {self.focus} {self.before} → {self.after}, on all others {others[0]} → {others[1]}; "
            f"accuracy {self.base.accuracy:.2%} → {self.adapted.accuracy:.2%}."
        )

    def broken_promises(self) -> list[str]:
        broken = []
        if not self.base_unchanged:
            broken.append("the frozen base changed.")
        if self.base.errors != self.base_errors:
            broken.append(
                f"with its adapters off the model makes {self.base.errors} errors, the base {self.base_errors}."
            )
        if self.after >= self.before:
            broken.append(f"the errors on {self.focus} did not fall ({self.before} → {self.after}).")
        if self.adapted.accuracy < self.base.accuracy:
            broken.append("the accuracy fell. More steps, or another seed, may help.")
        return broken


class _Runs:
    """The trainers of one repair: they log to `<log_dir>/repair/version_N/<part>`."""

    def __init__(self, log_dir: Path, accelerator: str) -> None:
        self.log_dir = log_dir
        self.accelerator = accelerator
        self.version = TensorBoardLogger(log_dir, name="repair").version
        self.folder = log_dir / "repair" / f"version_{self.version}"

    def trainer(self, part: str, *callbacks: Callback, max_epochs: int | None = None, max_steps: int = -1) -> Trainer:
        return Trainer(
            accelerator=self.accelerator,
            devices=1,
            logger=TensorBoardLogger(self.log_dir, name="repair", version=self.version, sub_dir=part),
            callbacks=[RichProgressBar(refresh_rate=10), *callbacks],
            max_epochs=max_epochs,
            max_steps=max_steps,
            log_every_n_steps=10,
            num_sanity_val_steps=0,
            enable_model_summary=False,
        )


def _pretrain(runs: _Runs, data: MNISTDataModule) -> Path:
    checkpoint = ModelCheckpoint(runs.folder / "base" / "checkpoints", filename="base")
    runs.trainer("base", checkpoint, max_epochs=1).fit(Classifier(RichBoyNet()), datamodule=data)
    return Path(checkpoint.best_model_path)


def _count(runs: _Runs, data: MNISTDataModule, base_path: Path, what: Literal["validate", "test"]) -> Confusion:
    """Count which class the base on disk takes for which, without adapters ever attached."""
    model, confusion = Classifier(RichBoyNet()), ConfusionReport(verbose=False)
    load_base(model, base_path)
    trainer = runs.trainer("base", confusion)
    getattr(trainer, what)(model, datamodule=data, verbose=False)
    assert confusion.report is not None
    return confusion.report.model


def _adapt_and_test(runs: _Runs, data: MNISTDataModule, callback: LoRAFinetuning, steps: int) -> Report:
    optimizer = partial(torch.optim.Adam, lr=_LEARNING_RATE, fused=True)
    model, confusion = Classifier(RichBoyNet(), optimizer, OneCycle), ConfusionReport()
    checkpoint = ModelCheckpoint(runs.folder / "adapted" / "checkpoints", filename="adapters")
    epochs = -(-steps // len(data.train_dataloader()))
    trainer = runs.trainer("adapted", callback, confusion, checkpoint, max_epochs=epochs, max_steps=steps)
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    assert confusion.report is not None
    return confusion.report


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence Lightning's information about machines and files."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
