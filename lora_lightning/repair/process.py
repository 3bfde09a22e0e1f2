"""Goes through the parts of one repair: base, weak class, adapters, choice, verdict."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from rich.markup import escape
from torch import nn

from lora_lightning.callbacks import ConfusionReport
from lora_lightning.data import MNISTDataModule
from lora_lightning.data.mnist_files import Source
from lora_lightning.lora import base_fingerprint
from lora_lightning.lora.scaling import scale_adapter, scaled
from lora_lightning.peft_format import save_adapter
from lora_lightning.repair.answers import Answers, Tally, mcnemar
from lora_lightning.repair.choice import LAMBDAS, choose, classes_in_focus
from lora_lightning.repair.training import Runs, Trained, Way
from lora_lightning.repair.verdict import Verdict
from lora_lightning.report import show

_PRETRAIN_BATCH_SIZE = 128
_ADAPT_BATCH_SIZE = 100
# The sample has a tenth of the digits: more epochs, fewer steps, and a larger share of it to choose by.
_EPOCHS: dict[Source, int] = {"full": 1, "sample": 4}
_STEPS: dict[Source, int] = {"full": 1500, "sample": 500}
_SHARES: dict[Source, float] = {"full": 0.15, "sample": 0.2}
_VAL_FRACTIONS: dict[Source, float] = {"full": 0.1, "sample": 0.2}


@dataclass(frozen=True)
class Settings:
    """Says what to repair, on what, and which adapters to choose from: without shares, from the one that suits the source."""

    base: Path | None
    focus: int | str
    source: Source
    data_dir: Path
    ranks: list[int]
    shares: list[float]
    steps: int | None
    seed: int


@dataclass(frozen=True)
class Setting:
    """Names one candidate: adapters of this rank, trained at this share, at this scale."""

    rank: int
    share: float
    scale: float


@dataclass(frozen=True)
class Outcome:
    """Holds what one repair came to.

    Args:
        verdict: Whether it is a repair, on test data.
        broken: The guarantees that do not hold.
        setting: What was chosen on validation data; `None` for the base.
        tested: The base's answers on test data.
        repaired: Those of the repaired model; of the base, if nothing was chosen.
    """

    verdict: Verdict
    broken: list[str]
    setting: Setting | None
    tested: Answers
    repaired: Answers


class Repair:
    """Repairs one base.

    Args:
        settings: What to repair, and how.
        runs: Makes the trainers.
    """

    def __init__(self, settings: Settings, runs: Runs) -> None:
        self.settings = settings
        self.runs = runs
        seed_everything(settings.seed, workers=True, verbose=False)
        found = _ready(MNISTDataModule(settings.data_dir, settings.source))
        self.source, self.description = found.source, found.description()
        self.data = self._digits(batch_size=_PRETRAIN_BATCH_SIZE)
        self.names = MNISTDataModule.class_names
        self.steps = settings.steps or _STEPS[self.source]

    def run(self) -> Outcome:
        """Go through all parts, and say what comes of each."""
        say(f"[bold]Data[/]: {escape(self.description)}.")
        self.base = self._base()
        self.validated = self.runs.base_answers(self.base, self.data, "validate")
        self.focus, why = classes_in_focus(self.settings.focus, self.validated.confusion(self.names))
        self.called = " and ".join(self.names[index] for index in self.focus)
        say(f"[bold]2. Weak digit[/]: {self.called} ({why}).")
        self.trained = {
            (rank, share): self.train("candidates", "adapters", self.focus, share, rank)
            for rank in self.settings.ranks
            for share in self.settings.shares or [_SHARES[self.source]]
        }
        setting = choose(self.validated.tally(self.focus), self._on_validation())
        tested = self.runs.base_answers(self.base, self.data, "test")
        if setting is None:
            verdict = Verdict(self.called, tested.tally(self.focus), None)
            say(f"[bold]4. Verdict[/]: {verdict.in_words()}")
            return Outcome(verdict, [], None, tested, tested)
        say(f"Chosen on validation data: rank {setting.rank}, share {setting.share:.0%}, scale {setting.scale:g}.")
        return self._test(setting, tested)

    def train(self, part: str, way: Way, focus: tuple[int, ...] | None, share: float, rank: int) -> Trained:
        """Train from the base, on augmented batches in which these classes have this share."""
        data = self._digits(
            focus=None if focus is None else list(focus),
            focus_fraction=share,
            augment=True,
            batch_size=_ADAPT_BATCH_SIZE,
        )
        if part == "candidates":
            what = f"base frozen, rank {rank}, {self.steps:,} steps with {share:.0%} of each batch {self.called}s"
            say(f"[bold]3. LoRA[/]: {what}.")
            part = f"candidates/rank-{rank}-share-{share:g}"
        return self.runs.train(part, self.base, data, way, steps=self.steps, seed=self.settings.seed, rank=rank)

    def _digits(self, **arguments: Any) -> MNISTDataModule:
        fraction = _VAL_FRACTIONS[self.source]
        return _ready(MNISTDataModule(self.settings.data_dir, self.source, val_fraction=fraction, **arguments))

    def _base(self) -> Path:
        if self.settings.base is not None:
            say(f"[bold]1. Base[/]: {escape(str(self.settings.base))}")
            return self.settings.base
        epochs = _EPOCHS[self.source]
        how_long = "one epoch" if epochs == 1 else f"{epochs} epochs"
        say(f"[bold]1. Base[/]: training the over-sized MLP on all ten digits for {how_long}.")
        return self.runs.pretrain(self.data, epochs)

    def _on_validation(self) -> dict[Setting, Tally]:
        found = {}
        for (rank, share), each in self.trained.items():
            for scale in LAMBDAS:
                with scaled(adapted(each), scale):
                    answers = self.runs.answers(each.model, self.data, "validate")
                found[Setting(rank, share, scale)] = answers.tally(self.focus)
        return found

    def _test(self, setting: Setting, tested: Answers) -> Outcome:
        trained = self.trained[setting.rank, setting.share]
        net, callback, report = adapted(trained), trained.adapters, ConfusionReport()
        assert callback is not None
        scale_adapter(net, setting.scale)
        self.runs.trainer("adapted", report).test(trained.model, datamodule=self.data, verbose=False)
        assert report.report is not None
        assert report.report.base is not None
        repaired = self.runs.answers(trained.model, self.data, "test")
        unchanged = base_fingerprint(net) == callback.base_fingerprint
        broken = broken_guarantees(unchanged, report.report.base.errors, tested.confusion(self.names).errors)
        folder = self.runs.folder / "adapter"
        save_adapter(net, folder)
        verdict = Verdict(self.called, tested.tally(self.focus), repaired.tally(self.focus))
        say(f"[bold]4. Verdict[/]: {verdict.in_words()}")
        say(f"McNemar's exact test against the base: p = {mcnemar(tested, repaired):.2g}.")
        say(f"Trained: {callback.trained_parameters()}, in {trained.seconds:.1f} s.")
        say(f"Base bitwise unchanged: {'yes' if unchanged else 'NO'} (SHA-256 {callback.base_fingerprint[:12]}).")
        say(f"Adapter: {escape(str(folder))}")
        for guarantee in broken:
            say(f"[bold red]Broken guarantee[/]: {guarantee}")
        return Outcome(verdict, broken, setting, tested, repaired)


def adapted(trained: Trained) -> nn.Module:
    """Return the part of a trained model that has the adapters."""
    assert trained.adapters is not None
    assert trained.adapters.adapted is not None
    return trained.adapters.adapted


def broken_guarantees(base_unchanged: bool, disabled: list[int], base: list[int]) -> list[str]:
    """Name what must hold of every adapted model and does not.

    Args:
        base_unchanged: Whether the frozen base is bitwise what it was.
        disabled: The errors on each class with the adapters off.
        base: The errors of the base on disk.
    """
    broken = [] if base_unchanged else ["the frozen base changed."]
    if disabled != base:
        broken.append(f"with its adapters off the model makes {disabled} errors, the base {base}.")
    return broken


def say(line: str) -> None:
    """Print a line to the terminal."""
    show(line, highlight=False, soft_wrap=True)


def _ready(data: MNISTDataModule) -> MNISTDataModule:
    """Download and read the data, so that their source and the number of batches are known."""
    data.prepare_data()
    data.setup("fit")
    return data
