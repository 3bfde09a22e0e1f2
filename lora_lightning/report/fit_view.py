"""Creates the summary of a training from its metrics."""

from __future__ import annotations

from math import isclose, isfinite
from typing import Any

from lora_lightning.report.charts import panels
from lora_lightning.report.class_view import trained_card
from lora_lightning.report.history import History
from lora_lightning.report.view import (
    Card,
    Change,
    Table,
    Verdict,
    VerdictKind,
    View,
    counted,
    kind_of,
    number,
    significant,
)

_MAIN = ("loss", "accuracy", "mae", "mean_recall")
"""Measures to judge a training by if no checkpoint monitors one."""
_HIGHER = ("acc", "recall", "precision", "f1", "auc", "iou", "r2", "score")


class FitView:
    """Reads the metrics of a training.

    Args:
        history: The logged metrics by step.
        facts: The content of `run.json`.
    """

    def __init__(self, history: History, facts: dict[str, Any]) -> None:
        self._facts = facts
        self._best: dict[str, Any] = facts.get("best") or {}
        self._counted: dict[str, Any] = facts.get("validations") or {}
        self.panels = panels(history)
        self._steps = sorted(history.rows)
        self._values: dict[str, list[tuple[int, float]]] = {}
        for step in self._steps:
            for name, value in history.rows[step].items():
                if isfinite(value) and name.count("/") < 2:
                    self._values.setdefault(name, []).append((step, value))
        self._validated = [name for name in self._values if name.startswith(("val/", "val_"))]
        self._monitor = self._monitored()

    def view(self) -> View:
        """Return what the page shows."""
        steps = self._steps[-1] if self._steps else 0
        epochs = self._facts.get("epochs")
        length = f"{steps:,} steps" + (f", {epochs:,} epoch{'s' if epochs > 1 else ''}" if epochs else "")
        return View("fit", length, self._verdict(), self._cards(length), tables=self._table(), has_base=False)

    def _monitored(self) -> str | None:
        """Return the name of the validation metric to judge by: the monitored one, or the first usual one."""
        named = self._best.get("monitor")
        if named in self._values:
            return str(named)
        usual = [name for word in _MAIN for name in self._validated if name[4:] == word]
        return next(iter([*usual, *self._validated]), None)

    def _lower_is_better(self, name: str) -> bool:
        if name == self._best.get("monitor") and self._best.get("mode"):
            return bool(self._best["mode"] == "min")
        return not any(word in name for word in _HIGHER)

    def _best_place(self) -> int:
        """Return the number of the validation of the saved checkpoint, or else of the best value."""
        assert self._monitor is not None
        values = [value for _, value in self._values[self._monitor]]
        score = self._best.get("score") if self._monitor == self._best.get("monitor") else None
        saved = [
            place for place, value in enumerate(values) if score is not None and isclose(value, score, rel_tol=1e-5)
        ]
        best = min if self._lower_is_better(self._monitor) else max
        return saved[0] if saved else values.index(best(values))

    @property
    def _keeps_last(self) -> bool:
        """Return whether the saved checkpoint is the last one, since no metric was monitored."""
        return bool(self._best.get("path")) and not self._best.get("monitor")

    def _kept_place(self) -> int:
        """Return the number of the validation to report: that of the saved checkpoint, or else the best one."""
        assert self._monitor is not None
        return len(self._values[self._monitor]) - 1 if self._keeps_last else self._best_place()

    def _when(self, place: int) -> str:
        assert self._monitor is not None
        count = len(self._values[self._monitor])
        word = "epoch" if count == self._facts.get("epochs") else "validation"
        return f"{word} {place + 1} of {count}"

    def _verdict(self) -> Verdict:
        what = "The model was trained"
        trained, total = self._facts.get("trained"), self._facts.get("total")
        if trained and total and trained < total:
            what = f"Adapters with {trained:,} parameters were trained"
        elif trained:
            what = f"A model with {trained:,} parameters was trained"
        after = "This is the validation that chose the checkpoint. Only a test says how good it is on other data."
        if self._monitor is None:
            sentence = f"{what}, without validation."
            return Verdict("plain", "training, not a test", sentence, "Only a test says how good it is on other data.")
        name, place = self._monitor, self._kept_place()
        if self._keeps_last:
            after = "The saved checkpoint is the last one. Only a test says how good it is on other data."
        values = [value for _, value in self._values[name]]
        first, best = values[0], values[place]
        kind: VerdictKind = "plain"
        errors = self._change_from_base()
        if errors is not None and errors.kind != "same":
            what_changed = f"{self._counted['name']} on {self._counted['samples']:,} validation samples"
            sentence = f"{what}: {errors.before} → {errors.after} {what_changed}."
            kind = "better" if errors.kind == "better" else "unsure"
            after = f"From the base to {self._when(place)}. {after}"
            if self._base_guesses:
                after = f"The head is new: the base's number is that of guessing. {after}"
        elif len(values) == 1:
            sentence = f"{what}: {name} is {significant(best)} at the only validation."
        else:
            change = kind_of(first, best, self._lower_is_better(name))
            words = {"better": "improved", "worse": "became worse", "same": "did not change"}[change]
            kind = "better" if change == "better" else "unsure"
            sentence = f"{what}, and {name} {words}: {significant(first)} → {significant(best)}."
            if change == "same" and place == 0:
                sentence = f"{what}, but {name} was never better than at the first validation: {significant(first)}."
            after = f"From the first validation to the {self._kept} one, {self._when(place)}. {after}"
        return Verdict(kind, "validation, not a test", sentence, after)

    @property
    def _kept(self) -> str:
        return "last" if self._keeps_last else "best"

    @property
    def _base_guesses(self) -> bool:
        """Return whether modules were trained in full, and the base is no better than the most frequent class."""
        base, guess, samples = (self._counted.get(name) for name in ("base", "guess", "samples"))
        if base is None or guess is None or not samples or not self._facts.get("trained_in_full"):
            return False
        return bool(base >= guess - 2 * (guess * (1 - guess / samples)) ** 0.5)

    def _change_from_base(self) -> Change | None:
        """Return the errors of the base and of the best validation, if they are known."""
        base, each = self._counted.get("base"), self._counted.get("each") or []
        if base is None or self._monitor is None or len(each) != len(self._values[self._monitor]):
            return None
        found = each[self._kept_place()]
        return None if found is None else self._change_of_errors(found)

    def _change_of_errors(self, after: float) -> Change:
        """Return the number of errors, or the mean absolute error, after that of the base."""
        base = self._counted["base"]
        return counted(base, round(after)) if self._counted["name"] == "errors" else number(base, after, True)

    def _cards(self, length: str) -> list[Card]:
        cards = [card] if (card := trained_card(self._facts)) else []
        if (change := self._change_from_base()) is not None:
            title = f"Validation {self._counted['name']}"
            cards.append(Card(title, change, f"{'guessing' if self._base_guesses else 'base'} → {self._kept}"))
        if self._monitor is not None:
            place, values = self._kept_place(), [value for _, value in self._values[self._monitor]]
            several = len(values) > 1
            kind = kind_of(values[0], values[place], self._lower_is_better(self._monitor))
            change = Change(significant(values[place]), significant(values[0]) if several else "", kind)
            cards.append(
                Card(self._monitor, change, f"first validation → {self._kept}" if several else "the only validation")
            )
            word, _, rest = self._when(self._best_place()).partition(" ")
            which = "lowest" if self._lower_is_better(self._monitor) else "highest"
            note = f"{which} {self._monitor}, {self._values[self._monitor][self._best_place()][0]:,} steps"
            if self._best.get("path"):
                note += "; the last one is saved" if self._keeps_last else "; the saved checkpoint"
            cards.append(Card(f"Best {word}", Change(rest), note))
        loss = next((self._values[name] for name in ("train/loss", "train_loss") if name in self._values), None)
        if loss is not None and len(loss) > 1:
            before, after = loss[0][1], loss[-1][1]
            change = Change(significant(after), significant(before), kind_of(before, after, True))
            cards.append(Card("Training loss", change, f"over {length}"))
        return cards[:4]

    def _table(self) -> list[Table]:
        names = [name for name in self._validated if len(self._values[name]) > 1]
        if not names:
            return []
        places = sorted({step for name in names for step, _ in self._values[name]})
        each, base = self._counted.get("each") or [], self._counted.get("base")
        errors = each if base is not None and len(each) == len(places) and None not in each else []
        known = {name: dict(self._values[name]) for name in names}
        rows: list[list[str | Change]] = []
        for place, step in enumerate(places):
            row: list[str | Change] = [f"{place + 1}", f"{step:,}"]
            row += [self._change_of_errors(errors[place])] if errors else []
            for name in names:
                value, first = known[name].get(step), self._values[name][0][1]
                change = Change("–")
                if value is not None:
                    kind = kind_of(first, value, self._lower_is_better(name)) if place else "same"
                    change = Change(significant(value), significant(first) if place else "", kind)
                row.append(change)
            rows.append(row)
        caption = "The metrics of each validation, after those of the first one"
        columns = ["validation", "step", *names]
        if errors:
            caption = f"The {self._counted['name']} after those of the base, and the metrics after the first ones"
            columns.insert(2, self._counted["name"])
        return [Table("Validation by validation", caption, columns, rows)]
