"""Creates the page of one pass over data of a task without classes: labels, values, and any other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_lightning.evaluation import ChangedSample
from lora_lightning.report.charts import Row, moves, scatter
from lora_lightning.report.class_view import own_metrics, trained_card
from lora_lightning.report.samples import read_samples
from lora_lightning.report.view import (
    LIKELY,
    Card,
    Change,
    Kind,
    Moves,
    SampleCard,
    Samples,
    Table,
    Verdict,
    VerdictKind,
    View,
    adapters_in_words,
    counted,
    number,
    p_in_words,
    share,
    significant,
)
from lora_lightning.wording import one_line

_LONGEST_NAME = 80
_LOWER_IS_BETTER = {"mae": True, "rmse": True, "r2": False, "errors": True}
_SHARES = ("recall", "precision", "f1", "accuracy", "micro_f1", "macro_f1")
_COUNTS = ("errors", "false_positives", "false_negatives")
_UNCHANGED = ("label", "targets", "support", "samples")
_WORDS = {
    "mae": "MAE",
    "rmse": "RMSE",
    "r2": "R²",
    "bias": "bias",
    "f1": "F1 %",
    "recall": "recall %",
    "precision": "precision %",
    "false_positives": "false alarms",
    "false_negatives": "missed",
    "accuracy": "all labels right, %",
    "micro_f1": "F1 over all labels, %",
    "macro_f1": "mean F1 of the labels, %",
}
_HIDDEN = ("true_positives", "true_negatives")
_SHOWN_INDICES = 50
_LABEL_COLUMNS = ("sample", "true labels", "base", "adapted")


class NumberView:
    """Describes the report of one pass over data of a task without classes.

    Args:
        content: The content of `comparison*.json`.
        facts: The content of `run.json`, as far as it is known.
        title: Which data: `test`, `val`, ....
        samples: Samples that changed.
    """

    def __init__(
        self,
        content: dict[str, Any],
        facts: Mapping[str, Any],
        title: str = "test",
        samples: Sequence[ChangedSample] = (),
    ) -> None:
        self._content = content
        self._facts = facts
        self.title = title
        self._model: dict[str, Any] = content["model"]
        self._base: dict[str, Any] = content["base"] or {}
        self._errors: dict[str, Any] = content.get("errors") or {}
        self._is_regression = "mae" in self._model
        self._kept = samples

    @classmethod
    def read(cls, path: Path, facts: Mapping[str, Any]) -> NumberView:
        """Read the file `comparison*.json` and the one with samples beside it."""
        samples = path.with_name(path.name.replace("comparison", "samples", 1))
        title = path.stem.removeprefix("comparison").strip("_-").replace("_", " ") or "test"
        kept = read_samples(samples) if samples.is_file() else []
        return cls(json.loads(path.read_text(encoding="utf-8")), facts, title, kept)

    def view(self) -> View:
        """Return what the page shows."""
        content = self._content
        main = "mae" if self._is_regression else "accuracy"
        _, base = adapters_in_words(content)
        return View(
            self.title,
            f"{content['samples']:,} samples",
            self.verdict(),
            self._cards(),
            base,
            moves=self._moves(),
            scatter=scatter(self._errors.get("points", []), content["samples"]),
            samples=self._samples(),
            tables=[*own_metrics(content), *self._value_tables(), *self._tables()],
            has_base=bool(self._base),
            read_as=str(content.get("read_as") or ""),
            score=self._change(main, self._base, self._model) if main in self._model else Change("–"),
        )

    def verdict(self) -> Verdict:
        """Return the verdict on the adapters."""
        content, model, base = self._content, self._model, self._base
        main = "mae" if self._is_regression else "accuracy"
        before, after = base.get(main), model.get(main)
        if not base or before is None or after is None:
            numbers = [(name, value) for name, value in model.items() if name in (*_SHARES, "mae", "rmse", "r2")]
            found = ", ".join(f"{self._word(name)} {self._change(name, {}, model).after}" for name, _ in numbers[:3])
            what = f"The model on {content['samples']:,} samples: {found}." if found else "The numbers of the model."
            return Verdict("plain", "no base to compare with", what)
        adapters, _ = adapters_in_words(content)
        test, p = content.get("bootstrap"), content.get("p_value")
        change = self._change(main, base, model)
        numbers_in_words = f"{change.before} → {change.after}"
        better = change.kind == "better"
        is_likely = p is not None and p <= LIKELY and change.kind != "same"
        kind: VerdictKind = ("better" if better else "worse") if is_likely else "unsure"
        pill = f"{'better' if better else 'worse'} than chance explains" if is_likely else "within chance"
        detail = []
        if test is not None and p is not None:
            pill += f" · 95 % interval {_signed(test['low'])} to {_signed(test['high'])}"
            detail.append(
                "The interval is that of the change of a sample's mean absolute error, from a paired bootstrap over "
                f"samples ({p_in_words(p)})."
            )
        elif p is not None:
            pill += f" · {p_in_words(p)}"
        if content.get("changed") is not None:
            changed = content["changed"]
            detail.append(
                f"{changed['fixed']:,} samples were fixed and {changed['broke']:,} broken: all their labels have to be "
                "right. p is that of McNemar's exact test."
            )
        if self._is_regression:
            verb = "cut" if better else "raise"
            sentence = f"{adapters} {verb} the mean absolute error: {numbers_in_words}."
            unsure = f"{adapters} have a {'smaller' if better else 'larger'} mean absolute error ({numbers_in_words})"
        else:
            sentence = f"{adapters} get {'more' if better else 'fewer'} samples entirely right: {numbers_in_words} %."
            unsure = f"{adapters} get {'more' if better else 'fewer'} samples entirely right ({numbers_in_words} %)"
        if kind == "unsure":
            sentence = f"{unsure}, but chance explains a difference of this size."
            if change.kind == "same":
                sentence = f"{adapters} change nothing that can be seen: {numbers_in_words}."
            detail.append("To be sure, test on more samples.")
        return Verdict(kind, pill, sentence, " ".join(detail), p=p)

    def _cards(self) -> list[Card]:
        model, base = self._model, self._base
        cards = []
        if self._is_regression:
            cards.append(Card("Mean absolute error", self._change("mae", base, model), "in units of the target"))
            if self._errors:
                improved, worsened, total = self._errors["improved"], self._errors["worsened"], self._content["samples"]
                kind: Kind = "better" if improved > worsened else "worse" if improved < worsened else "same"
                text = Change(f"{improved:,} of {total:,}", kind=kind)
                cards.append(Card("Improved", text, f"samples with a smaller error; {worsened:,} with a larger one"))
            else:
                cards.append(Card("RMSE", self._change("rmse", base, model), "root of the mean squared error"))
            if model.get("r2") is not None:
                cards.append(Card("R²", self._change("r2", base, model), "share of the variance of the targets"))
            cards.append(Card("Bias", self._change("bias", base, model), "mean of prediction − target"))
            return cards
        for name in ("accuracy", "micro_f1", "macro_f1"):
            if name in model:
                cards.append(Card(_first_upper(self._word(name)), self._change(name, base, model)))
        trained = trained_card(self._facts)
        return [*cards, trained][:4] if trained else cards

    def _moves(self) -> Moves | None:
        rows, before = self._rows(self._model), self._rows(self._base)
        name = "mae" if self._is_regression else "errors"
        if not rows or name not in rows[0]:
            return None
        first = next(iter(rows[0]))
        found = []
        for index, row in enumerate(rows):
            if row[name] is None:
                continue
            was = before[index].get(name) if before else None
            change = self._change(name, before[index] if before else {}, row)
            found.append(Row(_name(first, row[first]), was, row[name], change))
        if self._is_regression:
            note = "Mean absolute error by the true value, most improved first, from zero."
        else:
            note = "Wrong answers for each label, most improved first, from zero."
        return moves("Where errors changed", note, found, True, not self._is_regression)

    def _samples(self) -> list[Samples]:
        changed = self._content.get("changed")
        if changed is None:
            return []
        if self._kept:
            both = (
                ("Broken: right before, wrong now", "worse", "broke"),
                ("Fixed: wrong before, right now", "better", "fixed"),
            )
            return [part for title, kind, name in both if (part := self._kept_samples(title, kind, changed[name]))]
        broken, fixed = (list(self._content.get(name) or [])[:_SHOWN_INDICES] for name in ("broken", "fixed"))
        found = [
            Samples("Broken: right before, wrong now", "worse", changed["broke"], indices=broken),
            Samples("Fixed: wrong before, right now", "better", changed["fixed"], indices=fixed),
        ]
        return [each for each in found if each.indices]

    def _kept_samples(self, title: str, kind: str, count: int) -> Samples | None:
        """Return the samples of a kind: those that can be drawn as cards, or else all as rows."""
        names = [str(row["label"]) for row in self._rows(self._model)]
        cards = []
        for sample in self._kept:
            if sample.is_fixed is (kind == "better"):
                words = [
                    ", ".join(one_line(names[index], _LONGEST_NAME) for index in part) or "none"
                    for part in sample.labels
                ]
                cards.append(SampleCard(sample, *words, *[""] * 3))
        drawn = [each for each in cards if each.sample.image or each.sample.text or each.sample.signal]
        if not cards:
            return None
        of_kind: Kind = "better" if kind == "better" else "worse"
        rows: list[list[str | Change]] = [
            [
                "–" if each.sample.index is None else str(each.sample.index),
                each.target,
                each.base_name,
                Change(each.adapted_name, kind=of_kind),
            ]
            for each in cards
        ]
        return Samples(title, of_kind, count, drawn, [] if drawn else rows, columns=_LABEL_COLUMNS)

    def _value_tables(self) -> list[Table]:
        found = []
        for title, name in (("Worsened most", "most_worsened"), ("Improved most", "most_improved")):
            rows: list[list[str | Change]] = [
                [
                    "–" if each["index"] is None else str(each["index"]),
                    significant(each["target"]),
                    significant(each["base"]),
                    significant(each["adapted"]),
                    number(each["base_error"], each["error"], True),
                ]
                for each in self._errors.get(name, [])
            ]
            if rows:
                columns = ["sample", "target", "base", "adapted", "error"]
                caption = f"The samples that {title.lower().replace(' most', '')} most, by their index in the data set"
                found.append(Table(title, caption, columns, rows))
        return found

    def _tables(self) -> list[Table]:
        found = []
        rows, before = self._rows(self._model), self._rows(self._base)
        if rows:
            names = [name for name in rows[0] if name not in _HIDDEN]
            cells: list[list[str | Change]] = [
                [
                    _name(name, row[name])
                    if name in _UNCHANGED
                    else self._change(name, before[index] if before else {}, row)
                    for name in names
                ]
                for index, row in enumerate(rows)
            ]
            title = "Label by label" if names[0] == "label" else "By the true value"
            when = ", before and after" if before else ""
            caption = f"The numbers of each {'label' if names[0] == 'label' else 'fifth of the samples'}{when}"
            note = "" if len(rows) <= _SHOWN_INDICES else "comparison.csv contains all rows."
            found.append(Table(title, caption, [self._word(name) for name in names], cells, note))
        every = [name for name, value in self._model.items() if name not in ("samples", "values") and _is_number(value)]
        if every:
            lines: list[list[str | Change]] = [
                [self._word(name), self._change(name, self._base, self._model)] for name in every
            ]
            found.append(Table("All samples", "The numbers of all samples together", ["number", "value"], lines))
        return found

    def _change(self, name: str, base: dict[str, Any], model: dict[str, Any]) -> Change:
        """Return the number of this name, which is undefined if it is `None`."""
        after = float("nan") if model[name] is None else model[name]
        before = None if name not in base else float("nan") if base[name] is None else base[name]
        if name in _COUNTS:
            return counted(None if before is None else round(before), round(after))
        if name in _SHARES:
            return share(before, after)
        if name == "bias":
            return Change(_signed(after), "" if before is None else _signed(before), _closer_to_zero(before, after))
        return number(before, after, _LOWER_IS_BETTER.get(name))

    def _word(self, name: str) -> str:
        return _WORDS.get(name, name.replace("_", " "))

    def _rows(self, numbers: dict[str, Any]) -> list[dict[str, Any]]:
        return next((value for value in numbers.values() if isinstance(value, list)), [])


def _closer_to_zero(before: float | None, after: float) -> Kind:
    if before is None or abs(before) == abs(after):
        return "same"
    return "better" if abs(after) < abs(before) else "worse"


def _first_upper(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, int | float)


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{significant(value)}"


def _name(column: str, value: object) -> str:
    """Return a name or a number on one line. A label that is a number can not be mistaken for a count."""
    text = one_line(f"{value:,}" if isinstance(value, int) else str(value), _LONGEST_NAME)
    return f"label {text}" if column == "label" and text.isdigit() else text
