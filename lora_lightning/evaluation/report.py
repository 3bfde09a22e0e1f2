"""Defines `Report`, the result of one pass over the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from math import isnan
from typing import Any, Generic

from typing_extensions import TypeVar

from lora_lightning.evaluation.changes import Pairs
from lora_lightning.evaluation.confusion import Confusion
from lora_lightning.evaluation.paired import PairedBootstrap
from lora_lightning.evaluation.results import Compared, Result, all_loggable, loggable

ResultT = TypeVar("ResultT", bound=Result, default=Any)
_SHOWN_ROWS = 50
_LONGEST_NAME = 80


@dataclass(frozen=True)
class Report(Generic[ResultT]):
    """Holds the numbers of one pass over the data for the adapted model and, if it has adapters, for its base.

    Args:
        stage: `"test"` or `"val"`.
        adapted: Numbers of the model.
        base: Numbers of the model with disabled adapters, or `None` for a model without adapters.
        loader: Number of the data loader, if there are several.
        pairs: The samples that only one of the two models gets right, or `None` without a base.
        task: `"classes"`, `"next_tokens"`, `"tokens"`, `"segmentation"`, `"multilabel"` or `"regression"`.
        read_as: What is counted, in words.
        test: A paired bootstrap of the mean difference over samples, if there is one.
        metrics: The user's metrics by name, of the adapted model beside the base, with their difference.
        improved: Indices in the data set of the samples whose error decreased most, if their task has errors and the
            indices are known.
        worsened: Indices of the samples whose error increased most.
        against: Names of the adapters that the base has, if the report is not against the model without any.
    """

    stage: str
    adapted: ResultT
    base: ResultT | None = None
    loader: int | None = None
    pairs: Pairs | None = None
    task: str = "classes"
    read_as: str = ""
    test: PairedBootstrap | None = None
    metrics: Mapping[str, Compared] = field(default_factory=dict)
    improved: tuple[int, ...] = ()
    worsened: tuple[int, ...] = ()
    against: tuple[str, ...] = ()

    @property
    def model(self) -> ResultT:
        """Return `adapted`, whose name does not fit a model without adapters."""
        return self.adapted

    @property
    def p_value(self) -> float | None:
        """Return the p-value of the difference, or `None` without a base.

        It is that of McNemar's exact test for samples that are right or wrong, and else that of a paired bootstrap over
        samples.
        """
        exact = None if self.pairs is None else self.pairs.p
        return exact if exact is not None or self.test is None else self.test.p

    @property
    def fixed(self) -> tuple[int, ...] | None:
        """Return the indices in the data set of the samples that only the adapted model gets right.

        They are `None` without a base, for parts of samples, and if the order of the data loader is not known, for
        example if it shuffles.
        """
        return None if self.pairs is None else _known(self.pairs.fixed_indices, self.pairs.fixed)

    @property
    def broken(self) -> tuple[int, ...] | None:
        """Return the indices in the data set of the samples that only the base gets right, see `fixed`."""
        return None if self.pairs is None else _known(self.pairs.broken_indices, self.pairs.broke)

    @property
    def suffix(self) -> str:
        """Return Lightning's suffix for the names of this data loader, which is empty for a single one."""
        return "" if self.loader is None else f"/dataloader_idx_{self.loader}"

    def table(self) -> dict[str, list[Any]]:
        """Return a table as columns, which `pandas.DataFrame` accepts. With a base, they end in `_base` and `_adapted`.

        There is a row for each class, label or part of the data.
        """
        adapted = self.adapted.table()
        if self.base is None:
            return adapted
        base = self.base.table()
        shared = [name for name in adapted if name in ("class", "label", "targets", "support", "samples")]
        found = {name: adapted[name] for name in shared}
        for name in (each for each in adapted if each not in shared):
            found |= {f"{name}_base": base[name], f"{name}_adapted": adapted[name]}
        return found

    def summary(self) -> dict[str, Compared]:
        """Return the numbers of all samples by name, with the user's metrics."""
        base = {} if self.base is None else self.base.summary()
        found = {name: Compared(value, base.get(name)) for name, value in self.adapted.summary().items()}
        return found | dict(self.metrics)

    def metrics_to_log(self) -> dict[str, float]:
        """Return `test/recall/9`, `test/base_recall/9`, ... for the shown classes, or the summary for other tasks."""
        found: dict[str, float] = {}
        numbers = dict(self.metrics)
        if isinstance(self.adapted, Confusion):
            shown, names = self.adapted.shown(), all_loggable(self.adapted.class_names)
            for prefix, confusion in (("", self.adapted), ("base_", self.base)):
                for quantity in ("recall", "precision") if isinstance(confusion, Confusion) else ():
                    for index in shown:
                        value = getattr(confusion, quantity)[index]
                        found[f"{self.stage}/{prefix}{quantity}/{names[index]}{self.suffix}"] = value
        else:
            numbers = self.summary()
        for name, (value, before) in numbers.items():
            found[f"{self.stage}/{loggable(name)}{self.suffix}"] = value
            if before is not None:
                found[f"{self.stage}/base_{loggable(name)}{self.suffix}"] = before
        return {name: value for name, value in found.items() if not isnan(value)}

    def _repr_html_(self) -> str:
        """Return the summary and the table for a notebook."""
        rows = "".join(
            f'<tr><th scope="row">{escape(name)}</th><td>{_number(both.base)}</td>'
            f"<td>{_number(both.adapted)}</td><td>{_number(both.difference, sign='+')}</td></tr>"
            for name, both in self.summary().items()
        )
        p = "" if self.p_value is None else f"<p>p = {self.p_value:.2g} for a difference of zero</p>"
        columns = self.table()
        head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in columns)
        lines = list(zip(*columns.values(), strict=True))
        body = "".join(
            "<tr>" + "".join(f"<td>{_cell(each)}</td>" for each in line) + "</tr>" for line in lines[:_SHOWN_ROWS]
        )
        more = f"<p>The first {_SHOWN_ROWS} of {len(lines):,} rows.</p>" if len(lines) > _SHOWN_ROWS else ""
        return (
            f"<p>{escape(self.read_as or self.task)}; {self.adapted.total:,} counted</p>"
            f"<table><thead><tr><th></th><th>base</th><th>adapted</th><th>difference</th></tr></thead><tbody>{rows}</tbody></table>{p}"
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"
        )


def _known(indices: list[int], count: int) -> tuple[int, ...] | None:
    return tuple(sorted(indices)) if len(indices) == count else None


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None or isnan(value) else f"{value:{sign}#.4g}".removesuffix(".")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return _number(value)
    text = str(value)
    return escape(text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 1]}…")
