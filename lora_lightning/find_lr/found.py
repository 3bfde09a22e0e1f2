"""Defines the result of a sweep over learning rates, with its table and figure."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:  # matplotlib takes half a second to import
    from matplotlib.figure import Figure

_CLEAR = 0.02
"""Two losses that differ by less than this share of the lower one are not told apart."""
_SMOOTH = 0.9
_LOWER = 2.5
"""The answer of short runs is at least this factor below the rate with the lowest loss."""
_SHORT = 0.5
"""Runs are short if they have less than this share of the steps of `fit`."""


@dataclass(frozen=True)
class Trial:
    """Describes one short run.

    Attributes:
        factor: Factor of the configured learning rates.
        rate: Learning rate of the first parameter group of the first optimizer, its peak if it has a schedule with one.
        loss: Validation loss at the end, or infinity if the run diverged.
        curve: Training loss of each batch.
        seconds: Duration of the run, including its setup.
    """

    factor: float
    rate: float
    loss: float
    curve: tuple[float, ...]
    seconds: float

    @property
    def diverged(self) -> bool:
        """Return whether the loss became infinite or NaN."""
        return not isfinite(self.loss)


@dataclass(frozen=True)
class FoundRate:
    """Describes the result of `find_learning_rate`.

    Training is stable at higher rates in short runs than in long ones, in which adapters diverge suddenly. The answer
    of short runs is therefore not the rate with the lowest loss, but the next one that was tried below it.

    Attributes:
        trials: One trial per rate, from the lowest to the highest.
        steps: Number of training steps of each.
        monitor: Name of the validation loss.
        length: Number of steps of the configured `fit`.
    """

    trials: tuple[Trial, ...]
    steps: int
    monitor: str
    length: float = inf

    @property
    def best(self) -> Trial:
        """Return the trial with the lowest validation loss, and among equal ones that with the lowest rate."""
        return min(self.trials, key=_loss_of)

    @property
    def chosen(self) -> Trial:
        """Return the trial with the rate that is the answer."""
        if self.steps >= _SHORT * self.length:
            return self.best
        lower = [trial for trial in self.trials if trial.factor * _LOWER <= self.best.factor and not trial.diverged]
        finite = [trial for trial in self.trials if not trial.diverged]
        return max(lower, key=_factor_of) if lower else min(finite, key=_factor_of, default=self.best)

    @property
    def factor(self) -> float:
        """Return the factor of the configured learning rates that the answer is."""
        return self.chosen.factor

    @property
    def rate(self) -> float:
        """Return the learning rate that the answer is."""
        return self.chosen.rate

    @property
    def margin(self) -> float:
        """Return by which share of itself the lowest loss is below the second lowest, or infinity."""
        others = [trial.loss for trial in self.trials if trial is not self.best]
        second = min(others, default=inf)
        if not isfinite(second):
            return inf
        return (second - self.best.loss) / max(abs(self.best.loss), 1e-12)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return what speaks against the answer."""
        if self.best.diverged:
            return ("Every rate diverged: try lower ones.",)
        found = []
        if len(self.trials) > 1 and self.best is self.trials[0]:
            found.append("The lowest rate of the grid has the lowest loss: a lower one may be better.")
        if len(self.trials) > 1 and self.best is self.trials[-1]:
            found.append("The highest rate of the grid has the lowest loss: a higher one may be better.")
        close = [trial for trial in self.trials if trial is not self.best and self._is_close(trial)]
        if close:
            named = ", ".join(f"{trial.rate:.3g}" for trial in close)
            found.append(f"Not told apart from {self.best.rate:.3g} (loss within {_CLEAR:.0%}): {named}.")
        return tuple(found)

    def answer(self) -> str:
        """Return the answer in one line, or in two."""
        if self.best.diverged:
            return "No learning rate was found."
        by = "the only rate that did not diverge" if self.margin == inf else f"by {self.margin:.1%} of it"
        if len(self.trials) == 1:
            by = "the only rate of the grid"
        found, best = self.chosen, self.best
        start = f"Learning rate {found.rate:.3g}, {found.factor:g} x the configured one: "
        if found is best:
            return f"{start}lowest {self.monitor}, {by}."
        return (
            f"{start}the next below {best.rate:.3g}, which has the lowest {self.monitor}, {by}, after {self.steps:,} "
            f"steps.\nA rate that is the best in short runs can diverge in a long one."
        )

    def table(self) -> Table:
        """Return a table with one row per rate."""
        table = Table(title=f"{len(self.trials)} learning rates, {self.steps:,} steps each")
        for column in ("x", "learning rate", self.monitor, "train loss, smoothed", "seconds"):
            table.add_column(column, justify="right")
        for trial in self.trials:
            smoothed = _smoothed(trial.curve)
            cells = (
                f"{trial.factor:g}",
                f"{trial.rate:.3g}",
                "diverged" if trial.diverged else f"{trial.loss:.4f}",
                f"{smoothed[-1]:.4f}" if smoothed else "",
                f"{trial.seconds:.1f}",
            )
            table.add_row(*cells, style="bold" if trial is self.chosen and not trial.diverged else None)
        return table

    def figure(self) -> Figure:
        """Return a figure with the training loss by step for each rate, and the validation loss by rate."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        curves, losses = figure.subplots(1, 2)
        for trial in self.trials:
            smoothed = _smoothed(trial.curve)
            curves.plot(range(1, len(smoothed) + 1), smoothed, label=f"{trial.rate:.3g}")
        start = [trial.curve[0] for trial in self.trials if trial.curve]
        if start and isfinite(start[0]) and start[0] > 0:
            curves.set_ylim(0, 1.5 * start[0])  # one that diverges does not hide the others
        curves.set(title="training loss, smoothed", xlabel="step")
        curves.legend(title="learning rate")
        finite = [trial for trial in self.trials if not trial.diverged]
        losses.plot([trial.rate for trial in finite], [trial.loss for trial in finite], marker="o")
        losses.set(title=f"{self.monitor} after {self.steps:,} steps", xlabel="learning rate")
        losses.set_xscale("log")
        return figure

    def _is_close(self, trial: Trial) -> bool:
        return trial.loss - self.best.loss < _CLEAR * abs(self.best.loss)


def _loss_of(trial: Trial) -> float:
    return trial.loss


def _factor_of(trial: Trial) -> float:
    return trial.factor


def _smoothed(curve: tuple[float, ...]) -> list[float]:
    """Return the exponential moving average, corrected for its start."""
    found: list[float] = []
    mean = weight = 0.0
    for loss in curve:
        mean, weight = _SMOOTH * mean + (1 - _SMOOTH) * loss, _SMOOTH * weight + (1 - _SMOOTH)
        found.append(mean / weight)
    return found
