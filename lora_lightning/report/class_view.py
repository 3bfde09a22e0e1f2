"""Creates the page of one pass over data of a task with one class per sample, pixel or token."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lightning.evaluation import ChangedSample, Confusion
from lora_lightning.report.charts import Row, moves
from lora_lightning.report.counts import read_counts
from lora_lightning.report.figure import OTHERS
from lora_lightning.report.samples import by_turns, read_samples
from lora_lightning.report.view import (
    LIKELY,
    MOST_ROWS,
    Card,
    Cell,
    Change,
    Matrix,
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
    percent,
    share,
    signed,
)
from lora_lightning.wording import one_line

_LONGEST_NAME = 80
_PAIRS = 12
"""Number of confusions to list."""
_SHADE = 0.45
"""The strongest colour of a cell, on which text is still easy to read."""
_PARTS = {"segmentation": "pixels", "tokens": "tokens", "next_tokens": "tokens"}


class ClassView:
    """Describes the report of one pass over data.

    Args:
        content: The content of `confusion*.json`.
        matrices: The counts of the base, if any, and of the model.
        facts: The content of `run.json`, as far as it is known.
        title: Which data: `test`, `val`, ....
        samples: Samples that changed.
    """

    def __init__(
        self,
        content: dict[str, Any],
        matrices: Sequence[Tensor],
        facts: Mapping[str, Any],
        title: str = "test",
        samples: Sequence[ChangedSample] = (),
    ) -> None:
        self._content = content
        names = short_names(content["class_names"])
        *base, model = (Confusion(matrix, names) for matrix in matrices)
        self._kept = samples
        self._facts = facts
        self.task: str = content.get("task", "classes")
        self.model = model
        self.base = base[0] if base else None
        self.title = title
        self._shown = self.model.shown()
        self._parts = _PARTS.get(self.task, "samples")
        self._kind = _kind_of_names(names, facts)

    @classmethod
    def read(cls, path: Path, facts: Mapping[str, Any]) -> ClassView:
        """Read the file `confusion*.json` and those beside it."""
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        samples = path.with_name(path.name.replace("confusion", "samples", 1))
        title = path.stem.removeprefix("confusion").strip("_-").replace("_", " ") or "test"
        kept = read_samples(samples) if samples.is_file() else []
        return cls(content, _matrices_of(path, content), facts, title, kept)

    def view(self) -> View:
        """Return what the page shows."""
        return View(
            self.title,
            f"{self.model.total:,} {self._parts}",
            self.verdict(),
            self._cards(),
            self._before,
            self._moves(),
            self._matrices(),
            self._matrix_note,
            self._pairs(),
            samples=self._samples(),
            tables=[*self._own_metrics(), self._table()],
            has_base=self.base is not None,
            read_as=self._read_as,
            score=share(None if self.base is None else self.base.accuracy, self.model.accuracy),
        )

    @property
    def _read_as(self) -> str:
        return str(self._content.get("read_as") or "")

    @property
    def _before(self) -> str:
        _, base = adapters_in_words(self._content)
        return f"{base}, whose new head guesses" if self._base_guesses and self._has_new_head else base

    @property
    def _has_new_head(self) -> bool:
        return bool(self._facts.get("trained_in_full"))

    @property
    def _base_guesses(self) -> bool:
        """Return whether the base is no better than the most frequent class."""
        base = self.base
        if base is None or not base.total:
            return False
        guess = max(base.support) / base.total
        return bool(base.accuracy <= guess + 2 * (guess * (1 - guess) / base.total) ** 0.5)

    @cached_property
    def _focus(self) -> list[int]:
        """Return the classes that a repair or the data module had in focus."""
        named = set((self._facts.get("repair") or self._facts).get("focus") or [])
        return [index for index, name in enumerate(self._content["class_names"]) if name in named]

    def _called(self, index: int) -> str:
        """Return the name of a class so that nobody takes it for a count."""
        return f"{self._kind}{self.model.class_names[index]}"

    def _name_of_focus(self) -> str:
        return " and ".join(map(self._called, self._focus))

    def _changed(self) -> tuple[int, int] | None:
        changed = self._content.get("changed")
        return None if changed is None else (changed["fixed"], changed["broke"])

    @property
    def _p(self) -> float | None:
        changed = self._content.get("changed") or {}
        p = self._content.get("p_value")
        return changed.get("mcnemar_p") if p is None else p

    def verdict(self) -> Verdict:
        """Return the verdict on the adapters, with the p-value of all samples."""
        found = self._verdict()
        return found if self.base is None else replace(found, p=self._p)

    def _verdict(self) -> Verdict:
        model, base = self.model, self.base
        errors = sum(model.errors)
        if not model.total:
            return Verdict("plain", "no samples", "No samples were counted.")
        if base is None:
            worst = model.weakest()
            return Verdict(
                "plain",
                "no base to compare with",
                f"The model makes {errors:,} errors on {model.total:,} {self._parts}: {percent(model.accuracy)} % are "
                "correct.",
                f"Its weakest class is {self._called(worst)}: {model.errors[worst]:,} of {model.support[worst]:,} are "
                "wrong.",
            )
        if self._focus and self._facts.get("repair") and (found := self._verdict_of_repair()) is not None:
            return found
        adapters, _ = adapters_in_words(self._content)
        before, p, numbers = sum(base.errors), self._p, f"{sum(base.errors):,} → {errors:,}"
        kind, pill = self._chance(errors - before)
        if errors == before:
            changed = self._changed()
            same = "no prediction" if changed == (0, 0) else "no number of errors"
            return Verdict("unsure", pill, f"{adapters} change {same}: {numbers} errors.", self._detail())
        less = "fewer" if errors < before else "more"
        if p is not None and p > LIKELY:
            sentence = f"{adapters} make {less} errors ({numbers}), but chance explains a difference of this size."
            return Verdict("unsure", pill, sentence, f"{self._detail()} To be sure, test on more samples.")
        rate = f"{percent(base.accuracy)} % → {percent(model.accuracy)} %"
        sentence = f"{adapters} make {less} errors: {numbers} of {model.total:,} {self._parts}, accuracy {rate}."
        return Verdict(kind, pill, sentence, self._detail())

    def _chance(self, change: int) -> tuple[VerdictKind, str]:
        p, word = self._p, "better" if change < 0 else "worse"
        if p is None:
            return ("better" if change < 0 else "worse"), word
        if p > LIKELY or not change:
            return "unsure", f"within chance · {p_in_words(p)}"
        return ("better" if change < 0 else "worse"), f"{word} than chance explains · {p_in_words(p)}"

    def _detail(self) -> str:
        found, changed = [], self._changed()
        if changed is not None:
            found.append(f"{changed[0]:,} {self._parts} were fixed and {changed[1]:,} broken.")
        if self._p is not None:
            exact = (self._content.get("changed") or {}).get("mcnemar_p") is not None
            test = "McNemar's exact test of base against adapted" if exact else "a paired bootstrap over samples"
            found.append(f"p is that of {test}.")
        if self._base_guesses and self._has_new_head:
            found.append("The head is new: the base's numbers are those of guessing.")
        elif self._base_guesses:
            found.append("The accuracy of the base is no better than that of the most frequent class alone.")
        return " ".join(found)

    def _verdict_of_repair(self) -> Verdict | None:
        repair: dict[str, Any] = self._facts["repair"]
        outcome, p, name = repair.get("outcome"), repair.get("p"), self._name_of_focus()
        pill = "" if p is None else f" · {p_in_words(p)}"
        base, model = self.base, self.model
        assert base is not None
        before, after = (sum(each.errors[index] for index in self._focus) for each in (base, model))
        other = [sum(each.errors) - errors for each, errors in ((base, before), (model, after))]
        elsewhere = f"on all others {other[0]:,} → {other[1]:,}"
        detail, alone = self._detail(), repair.get("p_of_focus")
        if alone is not None:
            detail += f" On {name} alone, {p_in_words(alone)}."
        if outcome == "repaired":
            sentence = f"Repaired: {before:,} → {after:,} errors on {name}, {elsewhere}."
            return Verdict("better", f"better than chance explains{pill}", sentence, detail)
        if outcome == "improved":
            sentence = (
                f"Fewer errors: {before + other[0]:,} → {after + other[1]:,}. "
                f"On {name} alone ({before:,} → {after:,}), chance explains the difference."
            )
            command = str(repair.get("next", ""))
            detail += f" To be sure about {name}, test on more samples."
            return Verdict("better", f"better than chance explains{pill}", sentence, detail, command)
        if outcome == "within chance":
            sentence = (
                f"Fewer errors on {name} ({before:,} → {after:,}), but chance explains a difference of this size."
            )
            detail = f"{self._detail()} To be sure, test on more samples."
            return Verdict("unsure", f"within chance{pill}", sentence, detail, str(repair.get("next", "")))
        if outcome == "traded":
            sentence = f"Not a repair: {before:,} → {after:,} errors on {name}, but {elsewhere}."
            return Verdict("worse", "errors were traded", sentence, self._detail())
        if outcome == "kept":
            sentence = f"No repair: {before:,} → {after:,} errors on {name} on test data. Use the base."
            return Verdict("worse", f"no repair{pill}", sentence, self._detail())
        return None

    def _cards(self) -> list[Card]:
        model, base = self.model, self.base
        if not model.total:
            return []
        rate = f"accuracy {percent(model.accuracy)} %"
        if base is not None:
            rate = f"accuracy {percent(base.accuracy)} % → {percent(model.accuracy)} %"
        errors = Card(
            "Errors on all classes", counted(None if base is None else sum(base.errors), sum(model.errors)), rate
        )
        most = self._most_changed()
        focus = self._focus or [model.weakest() if most is None else most]
        name = " and ".join(map(self._called, focus))
        why = "the class in focus" if len(self._focus) == 1 else "the classes in focus" if self._focus else ""
        if not why:
            why = "the weakest class" if most is None else "the class that changed most"
        support = sum(model.support[index] for index in focus)
        cards = [
            Card(f"Errors on {name}", self._sum("errors", focus), f"{why}, {support:,} {self._parts}"),
            errors,
            Card(f"Others taken for {name}", self._sum("false_positives", focus), "false alarms"),
        ]
        if self.task == "segmentation":
            iou = share(None if base is None else base.mean_iou, model.mean_iou)
            cards[2] = Card("Mean IoU, %", iou, "of the classes that occur")
        return [*cards, trained_card(self._facts) or self._recall_card()]

    def _recall_card(self) -> Card:
        change = share(None if self.base is None else self.base.mean_recall, self.model.mean_recall)
        return Card("Mean recall, %", change, "every class counts the same")

    def _sum(self, quantity: str, classes: list[int]) -> Change:
        after, before = (
            None if each is None else sum(getattr(each, quantity)[index] for index in classes)
            for each in (self.model, self.base)
        )
        return counted(before, after or 0)

    def _most_changed(self) -> int | None:
        """Return the class whose number of errors changed most, or `None` if no class changed."""
        if self.base is None:
            return None
        changes = [abs(before - after) for before, after in zip(self.base.errors, self.model.errors, strict=True)]
        return max(range(len(changes)), key=changes.__getitem__) if any(changes) else None

    def _moves(self) -> Moves | None:
        model, base = self.model, self.base
        by_iou = self.task == "segmentation"
        rows = []
        for index, support in enumerate(model.support):
            if not support:
                continue
            if by_iou:
                before, after = (None if base is None else 100 * base.iou[index]), 100 * model.iou[index]
                change = share(None if base is None else base.iou[index], model.iou[index])
            else:
                before, after = (None if base is None else float(base.errors[index])), float(model.errors[index])
                change = counted(None if base is None else base.errors[index], model.errors[index])
            rows.append(Row(self._called(index), before, after, change, index in self._focus))
        what = "Intersection over union of each class, in percent" if by_iou else "Errors of each class"
        title = "Where it is wrong" if base is None else "Where IoU changed" if by_iou else "Where errors changed"
        order = "the worst first" if base is None else "most improved first"
        return moves(title, f"{what}, {order}, from zero.", rows, not by_iou, not by_iou)

    @property
    def _names(self) -> list[str]:
        """Return the names of the rows and columns of the matrices."""
        names = self.model.class_names
        return [names[index] for index in self._shown] + ([OTHERS] if len(self._shown) < len(names) else [])

    @property
    def _matrix_note(self) -> str:
        if len(self._names) == len(self.model.class_names):
            return ""
        return f"The {len(self._shown)} classes with the lowest recall; all others share the last row and column."

    def _pairs(self) -> Table | None:
        """Return the confusions that changed most, or occur most without a base, if the matrices leave out classes."""
        if not self._matrix_note:
            return None
        after = self.model.mistakes()
        before = {} if self.base is None else self.base.mistakes()
        sizes = {pair: abs(after.get(pair, 0) - before.get(pair, 0)) for pair in after.keys() | before.keys()}
        order = sorted((-size, pair) for pair, size in sizes.items() if size)[:_PAIRS]
        rows: list[list[str | Change]] = []
        for _, (target, taken) in order:
            was = None if self.base is None else before.get((target, taken), 0)
            change = counted(was, after.get((target, taken), 0))
            rows.append([self._called(target), self._called(taken), change])
        what = "changed most" if self.base is not None else "occur most"
        columns = ["true class", "taken for", self._parts]
        return Table("", f"The confusions that {what}", columns, rows) if rows else None

    def _matrices(self) -> list[Matrix]:
        found = {"model": self.model.of_classes(self._shown)}
        if self.base is not None:
            base = self.base.of_classes(self._shown)
            found = {"difference": found["model"] - base, "base": base, "adapted": found["model"]}
        off_diagonal = ~torch.eye(len(self._names), dtype=torch.bool)
        return [
            Matrix(title, self._names, _cells(matrix, _largest(matrix * off_diagonal), signed=title == "difference"))
            for title, matrix in found.items()
        ]

    def _samples(self) -> list[Samples]:
        changed = self._changed()
        if changed is None:
            return []
        found = []
        for title, kind, count in (
            ("Broken: right before, wrong now", "worse", changed[1]),
            (_FIXED, "better", changed[0]),
        ):
            chosen = by_turns([each for each in self._kept if each.is_fixed is (kind == "better")])
            cards = [self._sample_card(each) for each in chosen]
            drawn = [each for each in cards if each.sample.image or each.sample.text or each.sample.signal]
            rows = [_sample_row(each, self._kind) for each in cards] if not drawn else []
            if drawn or rows:
                found.append(Samples(title, "better" if kind == "better" else "worse", count, drawn, rows))
        return found

    def _sample_card(self, sample: ChangedSample) -> SampleCard:
        indices = (sample.target, sample.base, sample.model)
        names = self.model.class_names
        columns = [names[index] if index in self._shown else OTHERS for index in indices]
        base, adapted = names[sample.base], names[sample.model]
        return SampleCard(sample, self._called(sample.target), base, adapted, *columns)

    def _table(self) -> Table:
        model, base = self.model, self.base
        by_recall = sorted(
            range(len(model.class_names)),
            key=lambda index: (not model.support[index], model.recall[index], -model.errors[index]),
        )
        is_all = len(self._shown) == len(by_recall)
        order = list(range(len(by_recall))) if is_all else by_recall[:MOST_ROWS]
        columns = ["class", self._parts, "errors", "recall %", "precision %", "F1 %", "taken for it"]
        if self.task == "segmentation":
            columns.append("IoU %")
        rows = []
        for index in order:
            row: list[str | Change] = [
                self._called(index),
                f"{model.support[index]:,}",
                self._sum("errors", [index]),
                *(self._share(name, index) for name in ("recall", "precision", "f1")),
                self._sum("false_positives", [index]),
            ]
            if self.task == "segmentation":
                row.append(self._share("iou", index))
            rows.append(row)
        note = ""
        if not is_all:
            note = (
                f"Of {len(by_recall):,} classes, the {len(self._shown)} with the lowest recall are shown. "
                "confusion.csv contains all."
            )
        when = "" if base is None else ", before and after"
        return Table("Class by class", f"Errors, recall, precision and F1 of each class{when}", columns, rows, note)

    def _share(self, quantity: str, index: int) -> Change:
        before = None if self.base is None else getattr(self.base, quantity)[index]
        return share(before, getattr(self.model, quantity)[index])

    def _own_metrics(self) -> list[Table]:
        return own_metrics(self._content)


_FIXED = "Fixed: wrong before, right now"


def own_metrics(content: dict[str, Any]) -> list[Table]:
    """Return a table of the metrics that the user handed in, if there are any."""
    found = content.get("metrics") or {}
    rows: list[list[str | Change]] = [
        [
            one_line(name, _LONGEST_NAME),
            number(each["base"], float("nan") if each["adapted"] is None else each["adapted"]),
            "–" if each["difference"] is None else signed(each["difference"], is_count=False),
        ]
        for name, each in found.items()
    ]
    columns = ["metric", "value", "difference"]
    return [Table("Your metrics", "Your metrics, before and after", columns, rows)] if rows else []


def trained_card(facts: Mapping[str, Any]) -> Card | None:
    """Return the card with the number of trained parameters, if it is known."""
    trained, total = facts.get("trained"), facts.get("total")
    if not trained or not total:
        return None
    if trained == total:
        return Card("Trained", Change(f"{trained:,}"), "parameters, all of them")
    share = trained / (total - trained)
    return Card("Trained", Change(f"{trained:,}"), f"parameters, {share:.2%} of the frozen ones")


def short_names(names: list[str]) -> tuple[str, ...]:
    """Return names that are short enough for every cell of a matrix, and still differ."""
    short = [one_line(name, _LONGEST_NAME) for name in names]
    counts = Counter(short)
    return tuple(f"{name} ({place})" if counts[name] > 1 else name for place, name in enumerate(short))


def _kind_of_names(names: tuple[str, ...], facts: Mapping[str, Any]) -> str:
    """Return a word in front of names that are numbers."""
    if not any(name.lstrip("-").isdigit() for name in names):
        return ""
    noun = (facts.get("repair") or {}).get("noun")
    digits = [str(digit) for digit in range(10)]
    return f"{noun} " if noun else "digit " if list(names) == digits else "class "


def _sample_row(card: SampleCard, kind_of_name: str) -> list[str | Change]:
    sample = card.sample
    kind = "better" if sample.is_fixed else "worse"
    index = "–" if sample.index is None else f"{sample.index}"
    was, now = (
        f"{kind_of_name}{card.base_name}, {100 * sample.base_confidence:.0f} %",
        f"{kind_of_name}{card.adapted_name}, {100 * sample.confidence:.0f} %",
    )
    return [index, card.target, was, Change(now, kind="better" if kind == "better" else "worse")]


def _matrices_of(path: Path, content: dict[str, Any]) -> list[Tensor]:
    """Return the matrix of the base, if any, and of the model."""
    models = [each for each in (content.get("base"), content["model"]) if each is not None]
    if models[0]["matrix"] is not None:
        return [torch.tensor(each["matrix"]) for each in models]
    counts = path.with_name(path.stem.replace("confusion", "counts", 1) + ".csv")
    return read_counts(counts, len(content["class_names"]))


def _largest(matrix: Tensor) -> int:
    return max(1, int(matrix.abs().max())) if matrix.numel() else 1


def _cells(matrix: Tensor, most: int, *, signed: bool) -> list[list[Cell]]:
    rows = []
    for row, counts in enumerate(matrix.tolist()):
        cells = []
        for column, count in enumerate(counts):
            # Higher is better on the diagonal, lower is better elsewhere.
            shade = count / most * (-1 if row == column else 1) if signed or row != column else 0.0
            text = f"{count:+,}".replace("-", "−") if signed else f"{count:,}"
            cells.append(Cell(text if count else "", _SHADE * max(-1.0, min(1.0, shade))))
        rows.append(cells)
    return rows
