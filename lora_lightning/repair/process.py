"""Runs the steps of a repair: base, weak class, adapters, selection, verdict."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from rich import get_console
from rich.markup import escape

from lora_lightning.callbacks import ConfusionReport
from lora_lightning.callbacks.run_files import add_facts, machine_in_words
from lora_lightning.lora import base_fingerprint, scale_adapter, scaled
from lora_lightning.peft_format import save_adapter
from lora_lightning.repair.choice import LAMBDAS, Setting, choose, classes_in_focus
from lora_lightning.repair.predictions import Predictions, Tally, mcnemar
from lora_lightning.repair.task import Method, Task
from lora_lightning.repair.training import Runs, Trained
from lora_lightning.repair.verdict import Verdict
from lora_lightning.report import report_table
from lora_lightning.report.terminal import show


@dataclass(frozen=True)
class Settings:
    """Holds the classes to repair and the adapters to select from. The task provides defaults for shares and steps."""

    base: Path | None
    focus: int | str
    ranks: list[int]
    shares: list[float]
    steps: int | None
    seed: int


@dataclass(frozen=True)
class Outcome:
    """Holds the result of a repair.

    Args:
        verdict: The verdict on test data.
        broken: Guarantees that do not hold.
        setting: The setting that was selected on validation data, or `None` for the base.
        tested: Predictions of the base on test data.
        repaired: Predictions of the repaired model on test data, or of the base if nothing was selected.
    """

    verdict: Verdict
    broken: list[str]
    setting: Setting | None
    tested: Predictions
    repaired: Predictions


class Repair:
    """Repairs one base.

    Args:
        settings: The settings of the repair.
        task: Describes the model and the data.
        runs: Trains and evaluates.
    """

    def __init__(self, settings: Settings, task: Task, runs: Runs) -> None:
        self.settings = settings
        self.task = task
        self.runs = runs
        seed_everything(settings.seed, workers=True, verbose=False)
        self.data = task.evaluated()
        self.steps = settings.steps or task.steps

    def run(self) -> Outcome:
        """Run all steps and print their results."""
        say(f"[bold]Machine[/]: {machine_in_words()}, PyTorch {torch.__version__}.")
        say(f"[bold]Data[/]: {escape(self.task.description)}.")
        self.base = self._base()
        self.validated = self.runs.predict_base(self.task, self.base, self.data, "validate")
        self.focus, why = classes_in_focus(self.settings.focus, self.validated.confusion(self.task.names))
        self.called = " and ".join(self.task.names[index] for index in self.focus)
        say(f"[bold]2. Weak {self.task.noun}[/]: {escape(self.called)} ({why}).")
        self.trained = self._candidates()
        setting = choose(self.validated.tally(self.focus), self._on_validation())
        tested = self.runs.predict_base(self.task, self.base, self.data, "test")
        if setting is None:
            verdict = Verdict(self.called, tested.tally(self.focus), None)
            say(f"[bold]4. Verdict[/]: {escape(verdict.in_words())}")
            return Outcome(verdict, [], None, tested, tested)
        in_weights = "" if setting.scale == 1 else " The adapters that are saved have this scale in their weights."
        say(f"Chosen on validation data: {setting.in_words()}.{in_weights}")
        return self._test(setting, tested)

    def _complete_page(self, verdict: Verdict, adapter: Path, base: str) -> None:
        """Add the verdict to the report of the test."""
        facts = {
            "focus": [self.task.names[index] for index in self.focus],
            "noun": self.task.noun if self.task.noun == "digit" else "",
            "outcome": verdict.outcome,
            "p": verdict.p,
            "p_of_focus": verdict.p_of_focus,
            "next": _more_samples(self.task),
            "adapter": str(adapter),
        }
        add_facts(self.runs.folder / "adapted", {"repair": facts, "base": base})

    def _candidates(self) -> dict[tuple[int, float], Trained]:
        return {
            (rank, share): self.train("candidates", "adapters", self.focus, share, rank)
            for rank in self.settings.ranks
            for share in self.settings.shares or [self.task.share]
        }

    def train(self, part: str, method: Method, focus: tuple[int, ...] | None, share: float, rank: int) -> Trained:
        """Train from the base on augmented batches in which these classes have this share."""
        if part == "candidates":
            mixed = f"{share:.0%} of each batch {escape(self._many())}"
            say(f"[bold]3. LoRA[/]: base frozen, rank {rank}, {self.steps:,} steps with {mixed}.")
            part = f"candidates/rank-{rank}-share-{share:g}"
        seed_everything(self.settings.seed, workers=True, verbose=False)
        data = self.task.mixed(focus, share)
        return self.runs.train(part, self.task, self.base, data, method, self.steps, rank)

    def _many(self) -> str:
        return f"{self.called}s" if self.task.noun == "digit" else f"from {self.called}"

    def _base(self) -> Path:
        if self.settings.base is not None:
            say(f"[bold]1. Base[/]: {escape(str(self.settings.base))}")
            checkpoint = self.settings.base
        else:
            recipe = self.task.recipe()
            say(f"[bold]1. Base[/]: {escape(recipe.description)}.")
            checkpoint = self.runs.train_base(recipe)
        return self.task.plain_base(checkpoint, self.runs.folder / "base")

    def _on_validation(self) -> dict[Setting, Tally]:
        found = {}
        for (rank, share), trained in self.trained.items():
            for scale in LAMBDAS:
                with scaled(trained.adapted, scale):
                    predictions = self.runs.predict(trained.model, self.data, "validate")
                found[Setting(rank, share, scale)] = predictions.tally(self.focus)
        return found

    def _test(self, setting: Setting, tested: Predictions) -> Outcome:
        trained = self.trained[setting.rank, setting.share]
        net, callback, report = trained.adapted, trained.adapters, ConfusionReport(verbose=False)
        report.settings = {"focus": self.called, "share": setting.share, "scale": setting.scale}
        assert callback is not None
        scale_adapter(net, setting.scale)
        self.runs.trainer("adapted", report).test(trained.model, datamodule=self.data, verbose=False)
        assert report.report is not None
        assert report.report.base is not None
        show(report.report.read_as, markup=False, highlight=False, soft_wrap=True)
        show(report_table(report.report))
        repaired = self.runs.predict(trained.model, self.data, "test")
        unchanged = base_fingerprint(net) == callback.base_fingerprint
        broken = broken_guarantees(unchanged, report.report.base.errors, tested.confusion(self.task.names).errors)
        folder = self.runs.folder / "adapter"
        save_adapter(net, folder)
        p = mcnemar(tested, repaired)
        of_focus = mcnemar(tested.of_classes(self.focus), repaired.of_classes(self.focus))
        verdict = Verdict(self.called, tested.tally(self.focus), repaired.tally(self.focus), p, of_focus)
        say(f"[bold]4. Verdict[/]: {escape(verdict.in_words())}")
        say(f"McNemar's exact test: p = {p:.2g} on all samples, {of_focus:.2g} on {escape(self.called)} alone.")
        base = f"bitwise unchanged (SHA-256 {callback.base_fingerprint[:12]})" if unchanged else "CHANGED"
        self._complete_page(verdict, folder, base)
        say(f"Trained: {callback.trained_parameters()}, in {trained.seconds:.1f} s.")
        say(f"Base bitwise unchanged: {'yes' if unchanged else 'NO'} (SHA-256 {callback.base_fingerprint[:12]}).")
        for guarantee in broken:
            say(f"[bold red]Broken guarantee[/]: {guarantee}")
        return Outcome(verdict, broken, setting, tested, repaired)


def _more_samples(task: Task) -> str:
    """Return the command that tests on more samples, if there is one."""
    return "lora-lightning repair --source full" if "sample" in task.options else ""


def broken_guarantees(base_unchanged: bool, disabled: list[int], base: list[int]) -> list[str]:
    """Return the guarantees of an adapted model that do not hold.

    Args:
        base_unchanged: Whether the frozen base is bitwise unchanged.
        disabled: Errors on each class with disabled adapters.
        base: Errors on each class of the base on disk.
    """
    broken = [] if base_unchanged else ["the frozen base changed."]
    if disabled != base:
        broken.append(f"with disabled adapters, the model makes {disabled} errors per class, and the base {base}.")
    return broken


def say(line: str) -> None:
    """Print a line with markup. A terminal gets it wrapped between words, and a file as it is."""
    show(line, highlight=False, soft_wrap=not get_console().is_terminal)
