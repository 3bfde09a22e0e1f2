"""The files of a run and its page: one file with the verdict first, for every task."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_lightning.evaluation import (
    Confusion,
    Labels,
    PairedBootstrap,
    Report,
    ValueChanges,
    Values,
    paired_bootstrap,
)
from lora_lightning.evaluation.changes import ChangedSample, Pairs, is_signal, small_image, small_signal
from lora_lightning.evaluation.results import Compared
from lora_lightning.lora import LoRAConfig, adapted_weights, attach
from lora_lightning.report import write_page
from lora_lightning.report.figure import report_figures
from lora_lightning.report.files import write_report
from lora_lightning.report.history import History, curves_figure
from lora_lightning.report.layers import layer_changes
from lora_lightning.report.samples import samples_figure
from lora_lightning.report.view import significant
from tests.conftest import ROOT
from tests.helpers import stir

NAMES = ("cat", "<b>dog</b>", "$x_{")
BEFORE = torch.tensor([[8, 2, 0], [4, 6, 0], [0, 1, 9]])
AFTER = torch.tensor([[9, 1, 0], [1, 9, 0], [1, 0, 9]])
SAMPLES = [
    ChangedSample(1, 0, 1, 0.6, 0.9, image=small_image(torch.rand(1, 28, 28))),
    ChangedSample(2, 2, 0, 0.7, 0.5, text="a text with <script>alert(1)</script> and $y_{ in it"),
]
FACTS = {
    "command": "lora-lightning test",
    "seed": "7",
    "versions": {"torch": "2.15"},
    "device": "CPU",
    "devices": 1,
    "trained": 10,
    "total": 1010,
    "layers": [{"name": "fc", "rank": 2, "parameters": 10, "norm": 0.5, "base_norm": None, "effective_rank": 1.5}],
    "checkpoint": None,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "version_0"
    report = Report("test", Confusion(AFTER, NAMES), Confusion(BEFORE, NAMES), pairs=Pairs(6, 2, SAMPLES))
    write_report(report, folder)
    (folder / "run.json").write_text(json.dumps(FACTS))
    (folder / "config.yaml").write_text("seed_everything: 7 # <i>\n")
    History({1: {"train/loss": 2.0}, 2: {"train/loss": 1.0, "val/loss": 1.5}}).write(folder / "metrics.csv")
    return folder


VOID = ("meta", "link", "img", "br", "wbr")


class Page(HTMLParser):
    """Reads a page as a screen reader does: tags, attributes, headings, and text without styles and scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str]]] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.addresses: list[str] = []
        self.captions: list[str] = []
        self.scrolls: list[bool] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.tags.append((tag, found))
        self.text += " " if tag in ("td", "th", "li", "p", "div", "b") else ""
        self.addresses += [value for key, value in found.items() if key in ("src", "href")]
        if tag == "table":
            self.captions.append("")
            self.scrolls.append(any(each.get("class") == "wide" for _, each in self.open))
        if tag not in VOID:
            self.open.append((tag, found))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1][0] if self.open else ""
        if inside == "caption":
            self.captions[-1] += data
        if inside not in ("style", "script"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        """Return the attributes of all tags of this name."""
        return [found for name, found in self.tags if name == tag]


def page_of(folder: Path, report: Report | None = None, facts: dict[str, Any] | None = None) -> Page:
    """Write the files of a run and its page, and read it."""
    if report is not None:
        write_report(report, folder)
    (folder / "run.json").write_text(json.dumps(FACTS | (facts or {})))
    write_page([folder], folder / "report.html")
    return Page(folder / "report.html")


def two_classes(fixed: int, broke: int, samples: list[ChangedSample] | None = None) -> Report:
    """A base with 15 errors on 100 samples, and adapters that fix and break some."""
    base = torch.tensor([[40, 10], [5, 45]])
    change = torch.tensor([[fixed, -fixed], [broke, -broke]])
    names = ("normal", "fault")
    return Report(
        "test", Confusion(base + change, names), Confusion(base, names), pairs=Pairs(fixed, broke, samples or [])
    )


def values(count: int = 60) -> Report:
    """Ages that adapters predict better."""
    targets = torch.stack((torch.ones(count), torch.linspace(18, 90, count), torch.zeros(count)), 1).double()
    errors = torch.linspace(-4, 6, count).double()
    before, after = (torch.stack((each.abs(), each**2, each), 1) for each in (errors, 0.5 * errors + 0.3))
    test = paired_bootstrap(after[:, 0] - before[:, 0])
    adapted, base = Values(targets, after, tuple(range(count))), Values(targets, before)
    return Report("test", adapted, base, task="regression", read_as="values: 1 per sample", test=test)


def test_a_bias_is_better_the_closer_it_is_to_zero(tmp_path: Path) -> None:
    page_of(tmp_path, values())
    html = (tmp_path / "report.html").read_text()
    assert (
        '<span title="bias">bias</span></th><td><i class="was">+1.00 →</i> <span class="better">+0.800</span>' in html
    )


def labels() -> Report:
    before = torch.tensor([[20, 30], [9, 9], [10, 5], [61, 56]])
    after = torch.tensor([[25, 29], [9, 12], [5, 6], [61, 53]])
    names = ("7", "a label with a long name that goes on and on")
    pairs = Pairs(20, 4, fixed_indices=list(range(20)), broken_indices=[50, 51, 52, 53])
    return Report("test", Labels(after, names, 100, 86), Labels(before, names, 100, 70), pairs=pairs, task="multilabel")


def pixels() -> Report:
    names = ("sky", "road", "car")
    base = torch.tensor([[900, 20, 30], [10, 500, 40], [10, 30, 200]])
    adapted = torch.tensor([[910, 20, 20], [10, 520, 20], [10, 35, 195]])
    test = PairedBootstrap(0.02, 0.01, 0.03, 0.0004)
    pairs = Pairs(40, 15, [], are_independent=False)
    both = (Confusion(adapted, names), Confusion(base, names))
    return Report("test", *both, pairs=pairs, task="segmentation", test=test)


def questions() -> Report:
    """77 classes with long names."""
    names = tuple(f"why_was_my_card_payment_declined_{index}" for index in range(77))
    base = 30 * torch.eye(77, dtype=torch.int64) + 5 * torch.eye(77, dtype=torch.int64).roll(1, 1)
    adapted = 33 * torch.eye(77, dtype=torch.int64) + 2 * torch.eye(77, dtype=torch.int64).roll(1, 1)
    samples = [ChangedSample(each, each + 1, each, 0.6, 0.9, text="Why?", index=each) for each in range(40)]
    return Report("test", Confusion(adapted, names), Confusion(base, names), pairs=Pairs(231, 0, samples))


def trained() -> History:
    history = History({step: {"train/loss": 1 / step, "lr": 0.1} for step in range(1, 31)})
    for step, loss in ((10, 0.8), (20, 0.4), (30, 0.6)):
        history.record(step, {"val/loss": loss})
    return history


@pytest.mark.smoke
def test_the_page_starts_with_the_verdict_and_is_one_small_file_without_anything_from_outside(run: Path) -> None:
    write_page([run], run / "report.html")
    page = Page(run / "report.html")
    assert page.open == []
    assert all(each.startswith(("data:", "#")) for each in page.addresses)
    assert "http" not in (run / "report.html").read_text()
    assert (run / "report.html").stat().st_size < 3_000_000
    first = page.text.index("The adapters make fewer errors (7 → 3), but chance explains a difference of this size.")
    assert first < page.text.index("Errors on all classes") < page.text.index("Where errors changed")
    assert "within chance · p = 0.29" in page.text
    assert "6 samples were fixed and 2 broken. p is that of McNemar's exact test of base against adapted." in page.text
    assert "parameters, 1.00% of the frozen ones" in page.text
    assert "seed_everything: 7 # <i>" in page.text
    assert "effective rank" in page.text
    assert "a text with <script>alert(1)</script>" in page.text  # as text, not as a tag
    assert page.addresses.count(SAMPLES[0].image) == 1
    assert not any("loading" in each for each in page.all("img"))  # prints show all of them


@pytest.mark.parametrize("kind", [values, labels, pixels, questions, lambda: two_classes(8, 1), trained])
def test_every_page_can_be_read_without_seeing_it(kind: Callable[[], Report | History], tmp_path: Path) -> None:
    made = kind()
    if isinstance(made, History):
        made.write(tmp_path / "metrics.csv")
    page = page_of(tmp_path, made if isinstance(made, Report) else None)
    assert page.open == []
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("title")) == len(page.all("main")) == len(page.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.captions
    assert all(page.captions)
    assert all(page.scrolls), "a table that is too wide scrolls inside its card"
    assert all(
        each["tabindex"] == "0" and each["aria-label"] for each in page.all("div") if each.get("class") == "wide"
    )
    assert all(each["alt"] for each in page.all("img"))
    assert all(each["role"] == "img" and each["aria-label"] for each in page.all("svg"))
    ids = [found["id"] for _, found in page.tags if "id" in found]
    assert len(ids) == len(set(ids))
    assert all({"scope"} <= set(each) for each in page.all("th"))


def test_text_has_contrast_in_light_and_dark() -> None:
    style = (ROOT / "lora_lightning/report/templates/style.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in style.split("prefers-color-scheme: dark")
    )
    assert set(light) == set(dark)

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    for colours in (light, dark):
        for text in ("ink", "soft", "better", "worse", "before"):
            for ground in ("card", "page"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for kind in ("better", "worse", "unsure"):
            assert contrast(colours[kind], colours[f"{kind}-bg"]) >= 4.5, kind
        assert contrast(colours["ink"], colours["quiet"]) >= 4.5


@pytest.mark.parametrize(
    ("fixed", "broke", "words", "kind"),
    [
        (8, 1, "The adapters make fewer errors: 15 → 8 of 100 samples, accuracy 85.0 % → 92.0 %.", "better"),
        (6, 3, "The adapters make fewer errors (15 → 12), but chance explains a difference of this size.", "unsure"),
        (3, 6, "The adapters make more errors (15 → 18), but chance explains a difference of this size.", "unsure"),
        (0, 9, "The adapters make more errors: 15 → 24 of 100 samples", "worse"),
        (4, 4, "The adapters change no number of errors: 15 → 15 errors.", "unsure"),
        (0, 0, "The adapters change no prediction: 15 → 15 errors.", "unsure"),
    ],
)
def test_the_verdict_says_what_chance_allows(tmp_path: Path, fixed: int, broke: int, words: str, kind: str) -> None:
    page = page_of(tmp_path, two_classes(fixed, broke))
    assert words in page.text
    assert [each["class"] for each in page.all("span") if each.get("class", "").startswith("pill")] == [f"pill {kind}"]


def test_no_class_is_said_to_have_changed_if_none_has(tmp_path: Path) -> None:
    text = page_of(tmp_path, two_classes(0, 0)).text
    assert "Errors on normal 10 → 10 the weakest class, 50 samples" in text
    assert "changed most" not in text
    (tmp_path / "changed").mkdir()
    text = page_of(tmp_path / "changed", two_classes(0, 9)).text
    assert "Errors on fault 5 → 14 the class that changed most, 50 samples" in text


def test_what_became_worse_stands_before_what_became_better(tmp_path: Path) -> None:
    samples = [ChangedSample(0, 1, 0, 0.6, 0.9, index=4), ChangedSample(1, 1, 0, 0.6, 0.9, index=7)]
    page = page_of(tmp_path, two_classes(1, 1, samples))
    broken, fixed = page.text.index("Broken: right before"), page.text.index("Fixed: wrong before")
    assert broken < page.text.index("7 fault") < fixed < page.text.index("4 normal")


def test_every_number_stands_beside_that_of_the_base(tmp_path: Path) -> None:
    text = page_of(tmp_path, two_classes(8, 1)).text
    row = text[text.index("taken for it") :]
    assert "normal 50 10 → 2 80.0 → 96.0 88.9 → 88.9 84.2 → 92.3 5 → 6" in row


def test_digits_are_not_taken_for_counts(tmp_path: Path) -> None:
    names = tuple(map(str, range(10)))
    matrix = torch.full((10, 10), 2) + 10 * torch.eye(10, dtype=torch.int64)
    text = page_of(tmp_path, Report("test", Confusion(matrix, names), Confusion(matrix.T, names))).text
    assert "Errors on digit 0" in text
    assert "digit 7" in text


def test_signals_are_drawn_as_lines_and_what_can_not_be_drawn_is_a_table(tmp_path: Path) -> None:
    signal = small_signal(torch.sin(torch.arange(1000) / 50))
    assert len(signal) == 128
    assert not is_signal(torch.rand(8))
    samples = [ChangedSample(0, 1, 0, 0.6, 0.9, signal=signal, index=4)]
    page = page_of(tmp_path, two_classes(1, 0, samples))
    assert [each["aria-label"] for each in page.all("svg")] == ["signal of sample 4, normal"]
    (tmp_path / "table").mkdir()
    samples = [ChangedSample(0, 1, 0, 0.6, 0.9, index=index) for index in range(60)]
    page = page_of(tmp_path / "table", two_classes(60, 0, samples))
    assert page.all("svg") == [each for each in page.all("li") if each.get("class") == "sample"] == []
    assert "40 more" in page.text


def test_a_repair_is_named_as_the_command_names_it(tmp_path: Path) -> None:
    facts = {"outcome": "within chance", "p": 0.076, "focus": ["fault"], "noun": "", "next": "lora-lightning repair"}
    page = page_of(tmp_path, two_classes(6, 3), {"repair": facts, "base": "bitwise unchanged (SHA-256 abc)"})
    assert "Fewer errors on fault (5 → 8)" in page.text
    assert "within chance · p = 0.076" in page.text
    assert "base bitwise unchanged ✓" in page.text
    assert "fault *" in page.text
    facts |= {"outcome": "improved", "p": 1e-6, "p_of_focus": 0.73}
    (tmp_path / "improved").mkdir()
    page = page_of(tmp_path / "improved", two_classes(6, 3), {"repair": facts})
    assert "On fault alone (5 → 8), chance explains the difference." in page.text
    assert "To be sure about fault, test on more samples. lora-lightning repair" in page.text
    assert "Repaired" not in page.text


def test_a_new_head_is_marked_as_guessing(tmp_path: Path) -> None:
    names = ("a", "b")
    base, adapted = torch.tensor([[26, 24], [25, 25]]), torch.tensor([[45, 5], [5, 45]])
    report = Report("test", Confusion(adapted, names), Confusion(base, names), pairs=Pairs(45, 6))
    head = {"trained_in_full": ["classifier"]}
    assert "base, whose new head guesses" in page_of(tmp_path, report, head).text
    (tmp_path / "old").mkdir()
    assert "guesses" not in page_of(tmp_path / "old", two_classes(8, 1), head).text
    (tmp_path / "none").mkdir()
    text = page_of(tmp_path / "none", report).text
    assert "guesses" not in text
    assert (
        "The accuracy of the base is no better than that of the most frequent class alone." in text
    )  # it is not trained, perhaps


def test_the_metrics_of_the_user_stand_beside_those_of_the_base(tmp_path: Path) -> None:
    report = replace(two_classes(3, 1), metrics={"f1": Compared(0.75, 0.5), "loss": Compared(2.5)})
    text = re.sub(r"\s+", " ", page_of(tmp_path, report).text)
    assert "metric value difference f1 0.500 → 0.750 +0.250 loss 2.50 –" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.38, "0.380"),
        (67, "67.0"),
        (123.4, "123"),
        (999.7, "1,000"),
        (-12345.6, "−12,346"),
        (1e-8, "1.00e−08"),
        (0, "0"),
    ],
)
def test_numbers_of_a_column_have_the_same_number_of_digits(value: float, text: str) -> None:
    assert significant(value) == text


def test_values_are_drawn_sample_by_sample(tmp_path: Path) -> None:
    page = page_of(tmp_path, values())
    assert "The adapters cut the mean absolute error: 2.64 → 1.40." in page.text
    assert "95 % interval" in page.text
    improved = re.search(r"([\d]+) of 60 samples with a smaller error; (\d+) with a larger one", page.text)
    assert improved is not None
    drawn = len(page.all("circle")) + len(page.all("rect"))
    assert (drawn, len(page.all("rect"))) == (60, int(improved[2]))
    assert page.text.index("Worsened most") < page.text.index("Improved most")
    every = re.sub(r"\s+", " ", page.text.partition("All samples")[2])
    assert "number value MAE 2.64 → 1.40 RMSE" in every


def test_values_that_are_not_finite_cost_no_page(tmp_path: Path) -> None:
    targets = torch.stack((torch.ones(4), torch.arange(4), torch.zeros(4)), 1).double()
    errors = torch.tensor([[1.0, 1, 1], [float("nan")] * 3, [float("inf")] * 3, [2.0, 4, 2]]).double()
    found = ValueChanges.of(Values(targets, errors), Values(targets, errors / 2))
    assert found.points == [(1.0, 0.5), (2.0, 1.0)]


def test_labels_have_their_verdict_and_the_samples_to_look_at(tmp_path: Path) -> None:
    text = page_of(tmp_path, labels()).text
    assert "The adapters get more samples entirely right: 70.0 → 86.0 %." in text
    assert "Broken: right before, wrong now (4) Index in the data set: 50, 51, 52, 53" in text
    assert "missed" in text
    assert "label 7" in text, "a name that can not be mistaken for a count"


def test_a_training_is_summarized(tmp_path: Path) -> None:
    trained().write(tmp_path / "metrics.csv")
    best = {"path": "epoch=1.ckpt", "monitor": "val/loss", "mode": "min", "score": 0.4}
    page = page_of(tmp_path, facts={"best": best, "epochs": 3})
    assert "Adapters with 10 parameters were trained, and val/loss improved: 0.800 → 0.400." in page.text
    assert "Best epoch 2 of 3" in page.text
    assert "validation, not a test" in page.text
    assert "Training loss 1.00 → 0.0333" in re.sub(r"\s+", " ", page.text)
    first = next(each["aria-label"] for each in page.all("svg"))
    page = page_of(tmp_path, facts={"best": best, "epochs": 3, "trained": 1000, "total": 1000})
    assert "A model with 1,000 parameters was trained, and val/loss improved: 0.800 → 0.400." in page.text
    assert first.startswith(
        "Curves of the training, loss: train/loss from 1.00 to 0.0333; val/loss from 0.800 to 0.600"
    )
    assert page.text.index("How it was trained") < page.text.index("What the adapters changed in the weights")


def test_the_curves_have_titles_in_words_and_a_legend_of_what_is_drawn(tmp_path: Path) -> None:
    rows = {step: {"train/loss": 1 / step, "lr": 0.002, "delta_norm": step / 8} for step in (1, 2, 3)}
    History(rows | {3: rows[3] | {"val/loss": 0.5}}).write(tmp_path / "metrics.csv")
    page = page_of(tmp_path)
    assert page.text.count("learning rate") == page.text.count("norm of ΔW") == 1
    assert "How it was trained training loss" in page.text  # a single validation is no curve
    assert page.text.count("0.002") == 1
    trained().write(tmp_path / "metrics.csv")
    assert "How it was trained training validation loss" in page_of(tmp_path).text


def test_a_page_of_a_run_without_base_samples_or_curves(tmp_path: Path) -> None:
    text = page_of(tmp_path, Report("val", Confusion(AFTER, NAMES))).text
    assert "The model makes 3 errors on 30 samples" in text
    assert "no base to compare with" in text
    assert "Broken" not in text


def test_long_names_break_after_underscores(tmp_path: Path) -> None:
    names = ("get_disposable_card", "<b>lost_card")
    sample = ChangedSample(0, 1, 0, 0.6, 0.9, text="where is it?")
    report = replace(two_classes(8, 1, [sample]), adapted=Confusion(AFTER[:2, :2], names))
    report = replace(report, base=Confusion(BEFORE[:2, :2], names))
    page = page_of(tmp_path, report)
    text = (tmp_path / "report.html").read_text()
    assert "is <b>get_<wbr>disposable_<wbr>card</b>" in text
    assert "base: &lt;b&gt;lost_<wbr>card" in text
    assert text.count('title="get_disposable_card">get_<wbr>disposable_<wbr>card<') >= 3  # chart, matrix and table
    assert page.open == []


def test_samples_of_every_class_are_seen_without_unfolding(tmp_path: Path) -> None:
    samples = [
        ChangedSample(number // 20, 1 - number // 20, number // 20, 0.6, 0.9, text="a", index=number)
        for number in range(40)
    ]
    page = page_of(tmp_path, two_classes(40, 0, samples))
    first = page.text[page.text.index("Fixed:") : page.text.index("34 more")]
    assert (first.count("is normal"), first.count("is fault")) == (3, 3)


def test_what_became_worse_is_seen_among_many_classes_that_became_better(tmp_path: Path) -> None:
    names = tuple(f"intent number {index}" for index in range(77))
    base, adapted = 20 * torch.eye(77, dtype=torch.int64), 20 * torch.eye(77, dtype=torch.int64)
    base[range(60), 70], adapted[65, 3] = 30, 4
    page = page_of(tmp_path, Report("test", Confusion(adapted, names), Confusion(base, names)))
    chart = page.text[page.text.index("Where errors changed") : page.text.index("What is taken for what")]
    assert "Of 77 rows, the 20 that changed most in either direction." in chart
    assert "intent number 65 0 → 4 +4" in chart
    assert chart.count("30 → 0") == 19


def test_the_figure_of_samples_can_not_be_mistaken_for_counts_and_has_the_broken_ones_first() -> None:
    image = small_image(torch.rand(1, 28, 28))
    samples = [ChangedSample(1, 7, 1, 0.6, 0.9, image), ChangedSample(2, 2, 3, 0.7, 0.5, image)]
    figure = samples_figure(samples, tuple(map(str, range(10))))
    assert figure is not None
    words = [text.get_text() for text in figure.axes[0].texts]
    assert words == [
        "broken: is 2\nbase: 2, 70%\nadapted: 3, 50%",
        "fixed: is 1\nbase: 7, 60%\nadapted: 1, 90%",
    ]
    colours = [str(text.get_color()) for text in figure.axes[0].texts]
    style = (ROOT / "lora_lightning/report/templates/style.css").read_text()
    assert f"--better: {colours[1]}; --worse: {colours[0]};" in style


def test_a_matrix_of_few_classes_fills_its_card(tmp_path: Path) -> None:
    page = page_of(tmp_path, two_classes(8, 1))
    assert [each["style"] for each in page.all("table") if each["class"] == "matrix"] == ["--count: 2"] * 3
    style = (ROOT / "lora_lightning/report/templates/style.css").read_text()
    assert re.search(r"\.matrix {[^}]*width: 100%;\s+max-width: calc\(var\(--count\)", style)


def test_the_pill_of_a_model_without_a_base_does_not_look_like_a_button(tmp_path: Path) -> None:
    page = page_of(tmp_path, Report("val", Confusion(AFTER, NAMES)))
    pill = next(each["class"] for each in page.all("span") if each.get("class", "").startswith("pill"))
    style = (ROOT / "lora_lightning/report/templates/style.css").read_text()
    of_buttons = re.findall(r"^\.([\w-]+) {[^}]*cursor: pointer", style, re.MULTILINE)
    assert of_buttons
    assert not set(pill.split()) & set(of_buttons)


def test_the_legends_of_a_model_without_a_base_say_what_is_drawn(tmp_path: Path) -> None:
    page = page_of(tmp_path, Report("val", Confusion(BEFORE, NAMES)))
    assert "Errors of each class, the worst first, from zero." in page.text
    assert page.text.index("<b>dog</b> 4") < page.text.index("cat 2") < page.text.index("$x_{ 1")
    dots = [each["class"] for each in page.all("i") if each.get("class", "").startswith("dot")]
    assert dots == ["dot same", "dot square base", "dot worse"]
    drawn = {each["class"] for each in page.all("em")}
    assert drawn == {"same"}
    style = (ROOT / "lora_lightning/report/templates/style.css").read_text()
    grey = "background: var(--before); }"
    assert f".dot.same {{ {grey}" in style
    assert f".track em.same {{ {grey}" in style
    assert not [each for each in page.all("span") if each.get("class", "").startswith("step")]


def test_numbers_of_a_card_and_dates_stay_on_one_line(tmp_path: Path) -> None:
    page = page_of(tmp_path, values(), {"finished": "2026-11-30 18:57+00:00"})
    lengths = [each["style"] for each in page.all("b") if "style" in each]
    assert "+1.00 → +0.800" in page.text
    assert lengths[-1] == f"--length: {len('+1.00 → +0.800')}"  # which the size of the text follows
    style = (ROOT / "lora_lightning/report/templates/style.css").read_text()
    assert re.search(r"\.stat b {[^}]*white-space: nowrap[^}]*/ var\(--length\)", style)
    assert "together" in [each.get("class") for each in page.all("span")]
    assert ".together { white-space: nowrap; }" in style


def test_runs_are_compared_in_one_page(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "version_1"
    write_report(Report("test", Confusion(BEFORE, NAMES)), other)
    write_page([run, other], tmp_path / "both.html")
    page = Page(tmp_path / "both.html")
    assert page.addresses.count("#run-1") == page.addresses.count("#run-2") == 1
    assert "76.7 → 90.0" in page.text
    assert "76.7" in page.text


def test_a_thousand_classes_make_a_page_of_the_worst(tmp_path: Path) -> None:
    matrix = 10 * torch.eye(1000, dtype=torch.int64)
    matrix[7, 8] = 5
    names = tuple(f"class {index}" for index in range(1000))
    pairs = Pairs(1, 0, [ChangedSample(900, 3, 900, 0.5, 0.6)])
    report = Report("test", Confusion(matrix, names), Confusion(matrix, names), pairs=pairs)
    text = page_of(tmp_path, report).text
    assert "Of 1,000 classes, the 20 with the lowest recall are shown" in text
    assert "480 more rows" in text
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


def test_a_figure_in_percent_is_left_out_where_it_shows_the_same() -> None:
    names = ("a", "b")
    equal, unequal = torch.tensor([[60, 40], [1, 99]]), torch.tensor([[60, 40], [1, 9]])
    assert "confusion_normalized" not in report_figures(Report("test", Confusion(equal, names)))
    axes = report_figures(Report("test", Confusion(unequal, names)))["confusion_normalized"].axes[0]
    assert "%" in axes.get_title()
    assert [text.get_text() for text in axes.texts] == ["60", "40", "10", "90"]


def test_the_folder_gets_images_and_samples(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names >= {"confusion.png", "difference.png", "mistakes.png", "samples.json"}
    content = json.loads((run / "confusion.json").read_text())
    assert content["changed"] == {"fixed": 6, "broke": 2, "mcnemar_p": pytest.approx(0.2890625)}


def test_metrics_are_written_and_drawn_by_what_they_measure(run: Path) -> None:
    with (run / "metrics.csv").open() as file:
        assert list(csv.DictReader(file)) == [
            {"step": "1", "train/loss": "2.0", "val/loss": ""},
            {"step": "2", "train/loss": "1.0", "val/loss": "1.5"},
        ]
    history = History.read(run / "metrics.csv")
    history.record(3, {"val/loss": 1.25, "val/recall/9": 0.5, "lr": float("nan")})
    assert history.curves() == {
        "loss": {"train/loss": [(1, 2.0), (2, 1.0)], "val/loss": [(2, 1.5), (3, 1.25)]},
    }
    figure = curves_figure(history)
    assert figure is not None
    assert [axis.get_title() for axis in figure.axes] == ["loss"]
    assert curves_figure(History({1: {"loss": 1.0}})) is None


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["0", "2"]},
        {"target_modules": ["0"], "init": "pissa"},
        {"target_modules": ["0"], "use_rslora": True},
    ],
)
def test_layers_are_measured_as_their_dense_change(config: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 5))
    attach(net, LoRAConfig(rank=3, alpha=5, **config))
    assert all(each["effective_rank"] == each["norm"] == 0 for each in layer_changes(net))
    stir(net)
    for each, found in zip(adapted_weights(net), layer_changes(net), strict=True):
        change = each.adapter.delta_weight(each.weight)
        values = torch.linalg.svdvals(change.detach().flatten(1).double())
        shares = values / values.sum()
        shares = shares[shares > 1e-9]
        assert found["norm"] == pytest.approx(float(change.detach().norm()), rel=1e-5)
        assert found["base_norm"] == pytest.approx(float(each.weight.detach().norm()), rel=1e-5)
        assert found["effective_rank"] == pytest.approx(float((-shares * shares.log()).sum().exp()), rel=1e-4)
        assert found["rank"] == 3


def test_a_training_is_compared_with_its_base(tmp_path: Path) -> None:
    trained().write(tmp_path / "metrics.csv")
    best = {"path": "epoch=1.ckpt", "monitor": "val/loss", "mode": "min", "score": 0.4}
    counted = {"name": "errors", "samples": 300, "base": 90, "each": [70, 30, 40], "guess": 200}
    page = page_of(tmp_path, facts={"best": best, "epochs": 3, "validations": counted})
    assert "Adapters with 10 parameters were trained: 90 → 30 errors on 300 validation samples." in page.text
    assert "From the base to epoch 2 of 3. This is the validation that chose the checkpoint." in page.text
    assert "Validation errors 90 → 30 base → best" in page.text
    assert "90 → 40" in page.text  # in the table
    assert "guess" not in page.text

    page = page_of(tmp_path, facts={"best": {"path": "epoch=2.ckpt"}, "epochs": 3, "validations": counted})
    assert "90 → 40 errors on 300 validation samples. From the base to epoch 3 of 3." in page.text
    assert "Best epoch 2 of 3 lowest val/loss, 20 steps; the last one is saved" in page.text

    new_head: dict[str, Any] = {"validations": counted | {"base": 195}, "trained_in_full": ["head"]}
    page = page_of(tmp_path, facts={"best": best, "epochs": 3} | new_head)
    assert "The head is new: the base's number is that of guessing." in page.text
    assert "195 → 30 guessing → best" in page.text
    del new_head["trained_in_full"]  # a weak base has the head that it was trained with
    assert "guess" not in page_of(tmp_path, facts={"best": best, "epochs": 3} | new_head).text


def test_samples_of_several_labels_are_drawn_broken_first(tmp_path: Path) -> None:
    names = ("sky", "a long name of a label", "car")
    image = small_image(torch.rand(1, 28, 28))
    samples = [
        ChangedSample(1, 0, 1, 0, 0, image, index=4, labels=[[0, 1], [0], [0, 1]]),
        ChangedSample(1, 1, 0, 0, 0, image, index=7, labels=[[], [], [2]]),
    ]
    counts = torch.tensor([[5, 4, 3], [1, 0, 2], [2, 1, 0], [2, 5, 5]])
    both = Labels(counts, names, 10, 5), Labels(counts + 1, names, 10, 6)
    report = Report("test", both[1], both[0], pairs=Pairs(1, 1, samples), task="multilabel")
    page = page_of(tmp_path, report)
    assert "is none base: none adapted: car" in page.text
    assert "is sky, a long name of a label base: sky adapted: sky, a long name of a label" in page.text
    assert page.text.index("adapted: car") < page.text.index("base: sky")
    assert len(page.all("img")) == 2

    for sample in samples:
        object.__setattr__(sample, "image", "")
    page = page_of(tmp_path / "rows", Report("test", both[1], both[0], pairs=Pairs(1, 1, samples), task="multilabel"))
    assert "true labels" in page.text
    assert "7 none none car" in page.text


def test_the_confusions_that_changed_most_are_listed_if_the_matrices_leave_out_classes(tmp_path: Path) -> None:
    names = tuple(f"intent number {index}" for index in range(77))
    base = 10 * torch.eye(77, dtype=torch.int64)
    adapted = base.clone()
    base[5, 6], adapted[5, 6], adapted[70, 3] = 9, 1, 2
    page = page_of(tmp_path, Report("test", Confusion(adapted, names), Confusion(base, names), pairs=Pairs(8, 2)))
    assert "intent number 5 intent number 6 9 → 1 intent number 70 intent number 3 0 → 2" in page.text
    assert page.text.index("9 → 1") < page.text.index("The 20 classes with the lowest recall")
