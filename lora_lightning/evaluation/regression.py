"""Reads values: regression and forecasting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import fsum
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from lora_lightning.evaluation.exact_sums import ExactSums, product, squared_deviations, without_rounding
from lora_lightning.evaluation.paired import paired_bootstrap
from lora_lightning.evaluation.reading import Aligned, Batch, Context, Evidence, Reading, Sources, Tally, both_squeezed
from lora_lightning.evaluation.report import Report
from lora_lightning.evaluation.results import or_none, ratio

_QUANTILES = 5
_KEPT = 20
_LISTED, _POINTS = 10, 1000
"""Maximum numbers of samples in a list, and in a scatter plot."""
_COUNT, _MEAN, _SPREAD = 0, 1, 2
"""Columns of the targets of a sample: their number, mean, and sum of squared deviations from it."""
_ABSOLUTE, _SQUARED, _SIGNED = 0, 1, 2
"""Columns of the errors of a sample: sums of |e|, e² and e, with e = output - target."""
_OF_COUNT, _OF_SPREAD = 3, 4
"""Further columns of an output: the number of targets, and the sum of their squared deviations."""


@dataclass(frozen=True)
class Values:
    """Holds the errors of one model, by sample.

    If each sample has a row of K targets, each number is the mean of those of the K outputs, as in scikit-learn with
    `multioutput="uniform_average"`. Otherwise, all values count the same. Sums are rounded once, so that they do not
    depend on the order of the samples.

    Args:
        targets: Number of values, mean and sum of squared deviations of the targets of each sample, of shape (N, 3),
            float64.
        errors: Sums of |e|, e² and e of each sample, of shape (N, 3), float64, with e = output - target.
        indices: Index of each sample in the data set, if they are known.
        outputs: For several outputs, the sums of |e|, e² and e of each, the number of its targets, and the sum of
            their squared deviations from the mean, of shape (5, K), float64. Otherwise `None`.
    """

    targets: Tensor
    errors: Tensor
    indices: tuple[int, ...] | None = None
    outputs: Tensor | None = None

    @property
    def total(self) -> int:
        """Return the number of samples."""
        return len(self.targets)

    @cached_property
    def values(self) -> int:
        """Return the number of values of all samples."""
        return int(self.targets[:, _COUNT].sum())

    @cached_property
    def mae(self) -> float:
        """Return the mean absolute error."""
        return _average(self._means(_ABSOLUTE))

    @cached_property
    def mse(self) -> float:
        """Return the mean squared error."""
        return _average(self._means(_SQUARED))

    @cached_property
    def rmse(self) -> float:
        """Return the root of the mean squared error, which for several outputs is the mean of their roots."""
        return _average([mean**0.5 for mean in self._means(_SQUARED)])

    @cached_property
    def bias(self) -> float:
        """Return the mean of output - target."""
        return _average(self._means(_SIGNED))

    @cached_property
    def r2(self) -> float:
        """Return R², the share of the variance of the targets that the outputs explain.

        As in scikit-learn's `r2_score`, it is 1 for equal targets if the outputs are exact and 0 otherwise. It is
        undefined (NaN) for less than two values.
        """
        columns = (self._by_output[each] for each in (_OF_COUNT, _OF_SPREAD, _SQUARED))
        return _average([_r2(spread, squared) for count, spread, squared in zip(*columns, strict=True) if count > 1])

    def _means(self, column: int) -> list[float]:
        """Return the mean of a column of the errors for each output with targets."""
        counts, sums = self._by_output[_OF_COUNT], self._by_output[column]
        return [total / count for total, count in zip(sums, counts, strict=True) if count]

    @cached_property
    def _by_output(self) -> tuple[list[float], ...]:
        """Return the sums of |e|, e² and e, the number and the squared deviations of the targets of each output."""
        if self.outputs is not None:
            return tuple(each.tolist() for each in self.outputs)
        counts, means = self.targets[:, _COUNT], self.targets[:, _MEAN]
        mean = ratio(_sum(counts * means), self.values)
        spread = _sum(self.targets[:, _SPREAD] + counts * (means - mean) ** 2)
        known = without_rounding(*(torch.tensor(each, dtype=torch.float64) for each in (spread, mean, self.values)))
        errors = (_sum(self.errors[:, column]) for column in (_ABSOLUTE, _SQUARED, _SIGNED))
        return tuple([each] for each in (*errors, float(self.values), float(known)))

    def summary(self) -> dict[str, float]:
        """Return the numbers of all samples together, by name."""
        return {"mae": self.mae, "rmse": self.rmse, "bias": self.bias, "r2": self.r2}

    def table(self) -> dict[str, list[Any]]:
        """Return one column for each quantity, with a row for each fifth of the samples by their mean target."""
        groups = self.targets[:, _MEAN].sort(stable=True).indices.tensor_split(min(_QUANTILES, max(self.total, 1)))
        parts = [(self.targets[group], self.errors[group]) for group in groups if len(group)]
        each = [Values(targets, errors) for targets, errors in parts]
        return {
            "targets": [
                f"{float(part.targets[:, _MEAN].min()):.4g} to {float(part.targets[:, _MEAN].max()):.4g}"
                for part in each
            ],
            "samples": [part.total for part in each],
            "mae": [part.mae for part in each],
            "rmse": [part.rmse for part in each],
            "bias": [part.bias for part in each],
        }

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON. An undefined number is `None`."""
        columns = self.table()
        rows = [
            {name: or_none(each) if isinstance(each, float) else each for name, each in zip(columns, row, strict=True)}
            for row in zip(*columns.values(), strict=True)
        ]
        numbers: dict[str, Any] = {name: or_none(value) for name, value in self.summary().items()}
        return numbers | {"samples": self.total, "values": self.values, "quantiles": rows}


@dataclass(frozen=True)
class ValueSample:
    """Holds a sample with its mean target, mean outputs and mean absolute errors of the base and the adapted model.

    Args:
        index: Index in the data set, if it is known.
        target: Mean target.
        base: Mean output of the base.
        adapted: Mean output of the adapted model.
        base_error: Mean absolute error of the base.
        error: Mean absolute error of the adapted model.
    """

    index: int | None
    target: float
    base: float
    adapted: float
    base_error: float
    error: float


@dataclass(frozen=True)
class ValueChanges:
    """Compares the errors of two models by sample.

    Args:
        improved: Number of samples whose error decreased.
        worsened: Number of samples whose error increased.
        most_improved: The samples whose error decreased most.
        most_worsened: The samples whose error increased most.
        points: The errors of the base and of the adapted model on up to 1,000 samples at equal distances.
    """

    improved: int
    worsened: int
    most_improved: list[ValueSample]
    most_worsened: list[ValueSample]
    points: list[tuple[float, float]]

    @classmethod
    def of(cls, base: Values, adapted: Values) -> ValueChanges:
        """Compare two models on the same samples."""
        counts = adapted.targets[:, _COUNT]
        before, after = (each.errors[:, _ABSOLUTE] / counts for each in (base, adapted))
        changes = after - before
        finite = changes.isfinite().nonzero()[:, 0]
        order = finite[changes[finite].argsort(stable=True)].tolist()
        best = [place for place in order[:_LISTED] if float(changes[place]) < 0]
        worst = [place for place in order[::-1][:_LISTED] if float(changes[place]) > 0]
        points = torch.stack((before, after), 1)[finite][:: max(1, -(-len(order) // _POINTS))]

        def sample(place: int) -> ValueSample:
            target, count = float(adapted.targets[place, _MEAN]), float(counts[place])
            outputs = [target + float(each.errors[place, _SIGNED]) / count for each in (base, adapted)]
            index = None if adapted.indices is None else adapted.indices[place]
            return ValueSample(index, target, outputs[0], outputs[1], float(before[place]), float(after[place]))

        return cls(
            int((changes < 0).sum()),
            int((changes > 0).sum()),
            [sample(place) for place in best],
            [sample(place) for place in worst],
            [(float(f"{was:.4g}"), float(f"{now:.4g}")) for was, now in points.tolist()],
        )


class ValueTally(Tally):
    """Keeps the errors of each sample: some 70 bytes, whatever its number of values.

    Args:
        outputs: Number of outputs, if each sample has a row of them.
    """

    def __init__(self, outputs: int = 1) -> None:
        self._by_output: _OutputSums | None = _OutputSums(outputs) if outputs > 1 else None
        self._targets: list[Tensor] = []
        self._adapted: list[Tensor] = []
        self._base: list[Tensor] = []
        self._indices: list[int] | None = []

    @override
    def update(self, aligned: Aligned, base: Tensor | None, sources: Sources) -> None:
        assert aligned.counted is not None
        counted, samples = _precise(aligned.counted), aligned.samples
        known = counted.any(1)
        counts = counted.sum(1).double()
        targets = torch.where(counted, _precise(aligned.targets), 0).double()
        means = targets.sum(1) / counts
        spread = torch.where(counted, targets - means[:, None], 0).square().sum(1)
        self._targets.append(torch.stack((counts, means, spread), 1)[known].cpu())
        errors = [_errors(_precise(each), targets, counted) for each in (aligned.outputs, base) if each is not None]
        for own, each in zip((self._adapted, self._base), errors, strict=False):
            own.append(_row_sums(each)[known].cpu())
        if self._by_output is not None:
            if targets.shape[1] == self._by_output.outputs and not aligned.are_parts:
                self._by_output.add(targets, counted, errors)
            else:
                self._by_output = None
        if self._indices is not None:
            indices = sources.indices
            chosen = samples[known.to(samples.device)].tolist()
            self._indices = None if indices is None else self._indices + [indices[place] for place in chosen]

    @override
    def merge(self, other: Self) -> None:
        self._targets += other._targets
        self._adapted += other._adapted
        self._base += other._base
        if self._by_output is not None and other._by_output is not None:
            self._by_output.merge(other._by_output)
        else:
            self._by_output = None
        known = self._indices is not None and other._indices is not None
        self._indices = [*(self._indices or ()), *(other._indices or ())] if known else None

    @override
    def report(self, context: Context) -> Report[Values]:
        targets, adapted = torch.cat(self._targets), torch.cat(self._adapted)
        base = torch.cat(self._base) if self._base else None
        outputs: list[Tensor | None] = [None, None] if self._by_output is None else self._by_output.of_models()
        test = None
        improved: tuple[int, ...] = ()
        worsened: tuple[int, ...] = ()
        if base is not None:
            changes = (adapted - base)[:, _ABSOLUTE] / targets[:, _COUNT]
            test = paired_bootstrap(changes)
            improved, worsened = self._most(changes), self._most(-changes)
        return Report(
            context.stage,
            Values(targets, adapted, None if self._indices is None else tuple(self._indices), outputs[0]),
            None if base is None else Values(targets, base, outputs=outputs[1]),
            context.loader,
            None,
            "regression",
            context.read_as,
            test,
            context.metrics,
            improved,
            worsened,
        )

    @property
    @override
    def number_of_names(self) -> int:
        return 0

    @property
    @override
    def counted(self) -> int:
        return sum(map(len, self._targets))

    def _most(self, changes: Tensor) -> tuple[int, ...]:
        """Return the indices of the samples with the most negative change."""
        if self._indices is None:
            return ()
        places = [place for place in changes.argsort(stable=True)[:_KEPT].tolist() if float(changes[place]) < 0]
        return tuple(self._indices[place] for place in places)


class Regression(Reading[ValueTally]):
    """Reads values of shape (B, ...) and outputs of the same shape."""

    task = "regression"

    @override
    def align(self, batch: Batch) -> Aligned | None:
        outputs, targets = both_squeezed(batch)
        if outputs.shape != targets.shape or targets.is_complex() or targets.dtype == torch.bool:
            return None
        rows = targets.reshape(len(targets), -1)
        counted = torch.ones_like(rows, dtype=torch.bool)
        if rows.is_floating_point():
            counted = ~rows.isnan()
        if batch.ignore_index is not None:
            counted &= rows != batch.ignore_index
        samples = torch.arange(len(targets), device=targets.device)
        return Aligned(outputs.reshape(len(targets), -1), rows, samples, counted, targets.dim() > 2)

    @override
    def tally(self, aligned: Aligned) -> ValueTally:
        return ValueTally(1 if aligned.are_parts else aligned.width)

    @override
    def words(self, width: int, evidence: Evidence) -> str:
        return f"values: {width} per sample, from outputs {evidence.shapes()}"

    @override
    def doubt(self, evidence: Evidence, others: Sequence[str]) -> str | None:
        if evidence.are_whole and len(evidence.values) < 3:
            values = " or ".join(f"{value:g}" for value in sorted(evidence.values))
            return (
                f'all targets are {values}: set task to "regression" if they are values, or use 0 and 1 for two classes'
            )
        if evidence.are_shares:
            return (
                'the targets of each sample add up to 1, as shares of classes do: set task to "regression" for values, '
                "or give the numbers of the classes to count classes"
            )
        return None


class _OutputSums:
    """Sums over all samples for each output: targets, and the errors of the models.

    Args:
        outputs: Number of outputs K.
    """

    def __init__(self, outputs: int) -> None:
        self.outputs = outputs
        self._sums: ExactSums | None = None
        """Sums of 1, t and t² of the targets t, and of |e|, e² and e of each model, with K columns each."""

    def add(self, targets: Tensor, counted: Tensor, errors: list[Tensor]) -> None:
        """Add a batch of targets and errors of shape (N, K)."""
        squares, rest = product(targets, targets)
        columns = [counted.double(), targets, squares]
        for each in errors:
            columns += [each.abs(), each.square(), each]
        none = torch.zeros_like(targets)
        if self._sums is None:
            self._sums = ExactSums(len(columns) * self.outputs)
        self._sums.add(torch.cat(columns, 1), torch.cat([none, none, rest, *[none] * (len(columns) - 3)], 1))

    def merge(self, other: Self) -> None:
        """Add the sums of another device."""
        if self._sums is not None and other._sums is not None:
            self._sums.merge(other._sums)
        self._sums = self._sums or other._sums

    def of_models(self) -> list[Tensor | None]:
        """Return the sums for `Values`, of the adapted model and of the base."""
        assert self._sums is not None
        counts, _, _, *errors = self._sums.sums().view(-1, self.outputs)
        of_targets = slice(self.outputs, 2 * self.outputs), slice(2 * self.outputs, 3 * self.outputs)
        spread = squared_deviations(self._sums, *of_targets, counts)
        models = (errors[:3], errors[3:])
        return [torch.stack([*each, counts, spread]) if each else None for each in models]


def _errors(outputs: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, outputs.double() - targets, 0)


def _row_sums(errors: Tensor) -> Tensor:
    return torch.stack((errors.abs().sum(1), errors.square().sum(1), errors.sum(1)), 1)


def _r2(spread: float, squared: float) -> float:
    if not spread:
        return 0.0 if squared else 1.0
    return 1 - squared / spread


def _average(values: list[float]) -> float:
    return ratio(fsum(values), len(values))


def _precise(tensor: Tensor) -> Tensor:
    """Return a tensor on a device that has float64."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def _sum(values: Tensor) -> float:
    return fsum(values.tolist())
