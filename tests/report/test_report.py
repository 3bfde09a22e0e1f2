"""Per-class numbers, and the table, figure and files made of them."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lora_lightning.evaluation import Confusion, Report
from lora_lightning.report import confusion_figures, report_table
from lora_lightning.report.files import free_path, write_report
from lora_lightning.report.terminal import show

NAMES = ("cat", "dog", "eel")
BEFORE = Confusion(torch.tensor([[8, 2, 0], [4, 6, 0], [0, 0, 0]]), NAMES)
AFTER = Confusion(torch.tensor([[9, 1, 0], [1, 9, 0], [0, 0, 0]]), NAMES)


def printed(report: Report, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(report_table(report))
    return console.file.getvalue()


def test_numbers_follow_from_the_counts() -> None:
    assert BEFORE.total == 20
    assert BEFORE.support == [10, 10, 0]
    assert BEFORE.errors == [2, 4, 0]
    assert BEFORE.accuracy == 0.7
    assert BEFORE.recall[:2] == [0.8, 0.6]
    assert BEFORE.precision[:2] == [8 / 12, 6 / 8]
    assert math.isnan(BEFORE.recall[2])
    assert math.isnan(BEFORE.precision[2])


def test_the_weakest_class_is_the_one_of_lowest_recall_that_has_samples() -> None:
    assert BEFORE.weakest() == 1


def test_names_and_matrix_have_to_fit() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 3\), but there are 2 class names"):
        Confusion(BEFORE.matrix, ("a", "b"))


def test_the_table_has_a_row_a_class_and_one_for_all() -> None:
    text = printed(Report("test", AFTER, BEFORE))
    rows = [[cell.strip() for cell in line.strip("│ \n").split("│")] for line in text.splitlines() if "│" in line]
    assert ["cat", "10", "2", "1", "-1", "80.0 → 90.0", "66.7 → 90.0"] in rows
    assert ["dog", "10", "4", "1", "-3", "60.0 → 90.0", "75.0 → 90.0"] in rows
    assert ["eel", "0", "0", "0", "0", "– → –", "– → –"] in rows
    assert ["all", "20", "6", "2", "-4", "70.0 → 90.0"] in [row[:6] for row in rows]


@pytest.mark.parametrize("width", [80, 73, 60, 50, 40])
def test_a_narrow_terminal_gets_fewer_columns_and_no_number_is_cut(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_lightning.report.table.get_console", lambda: Console(width=width))
    names = tuple(map(str, range(10)))
    counts = 1000 * torch.eye(10, dtype=torch.int64) + 3
    classes = Report("test", Confusion(counts, names), Confusion(counts.flip(0), names))
    text = printed(classes, width)
    assert "…" not in text
    assert f"{sum(classes.base.errors):,}" in text
    assert max(map(len, text.splitlines())) <= width
    assert ("precision %" in text) is (width >= 74)
    assert ("10,300" in text) is (width >= 60)


def test_long_names_cut_no_number_in_a_terminal_of_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(f"a kind of fish that lives in the sea {index}" for index in range(10))
    counts = 1000 * torch.eye(10, dtype=torch.int64) + 3
    classes = Report("test", Confusion(counts, names), Confusion(counts.flip(0), names))
    for width in range(45, 121, 5):
        monkeypatch.setattr("lora_lightning.report.table.get_console", lambda width=width: Console(width=width))
        text = printed(classes, width)
        assert "…" not in text, text
        assert f"{sum(classes.base.errors):,}" in text, text
        assert max(map(len, text.splitlines())) <= width


def test_the_table_of_ten_digits_fits_80_columns() -> None:
    digits = tuple(map(str, range(10)))
    whole = Confusion(torch.eye(10, dtype=torch.int64) * 10_000, digits)
    text = printed(Report("test", whole, whole))
    assert "…" not in text
    assert "digit" in text
    assert sum("100.0 → 100.0" in line for line in text.splitlines()) == 11


def test_numbered_classes_that_are_no_digits_are_not_called_so() -> None:
    text = printed(Report("test", Confusion(torch.eye(3, dtype=torch.int64), ("0", "1", "2"))))
    assert "class" in text
    assert "digit" not in text


def test_the_table_of_a_plain_model_has_one_column_of_errors() -> None:
    text = printed(Report("val", BEFORE))
    assert "before" not in text
    assert "errors" in text


def test_figures_show_base_adapted_and_difference(tmp_path: Path) -> None:
    matrix = torch.randint(9, (3, 3))
    figures = confusion_figures(Report("test", Confusion(matrix, NAMES), Confusion(matrix.T, NAMES)))
    assert list(figures) == ["base", "adapted", "difference"]
    texts = [text.get_text() for text in figures["adapted"].axes[0].texts]
    assert texts == [str(int(count)) for count in matrix.flatten() if count]
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png")


def test_the_figure_of_a_plain_model_is_one_matrix() -> None:
    assert list(confusion_figures(Report("test", BEFORE))) == ["model"]


def test_files_hold_every_number(tmp_path: Path) -> None:
    paths = write_report(Report("test", AFTER, BEFORE), tmp_path / "run")
    json_path, csv_path = Path(paths["confusion.json"]), Path(paths["confusion.csv"])
    content = json.loads(json_path.read_text())
    assert json_path.name == "confusion.json"
    assert content["base"]["matrix"] == BEFORE.matrix.tolist()
    assert content["model"]["classes"][1] == {
        "name": "dog", "support": 10, "errors": 1, "recall": 0.9, "precision": 0.9, "f1": 0.9,
        "iou": 9 / 11, "false_positives": 1,
    }  # fmt: skip
    assert content["model"]["classes"][2]["recall"] is None
    with csv_path.open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        "class": "cat", "support": "10", "errors_before": "2", "errors_after": "1", "recall_before": "0.8",
        "recall_after": "0.9", "precision_before": str(8 / 12), "precision_after": "0.9",
        "f1_before": str(16 / 22), "f1_after": "0.9", "iou_before": str(8 / 14), "iou_after": str(9 / 11),
        "false_positives_before": "4", "false_positives_after": "1",
    }  # fmt: skip
    assert rows[2]["recall_after"] == ""


def test_a_second_report_does_not_overwrite_the_first(tmp_path: Path) -> None:
    first = Path(write_report(Report("test", AFTER), tmp_path)["confusion.json"])
    before = first.read_text()
    files = write_report(Report("test", BEFORE), tmp_path)
    second = Path(files["confusion.json"])
    assert {Path(each).stem.rpartition("-")[2] for each in files.values()} == {"v1"}
    assert (first.name, second.name) == ("confusion.json", "confusion-v1.json")
    assert first.read_text() == before
    assert free_path(tmp_path / "confusion.json").name == "confusion-v2.json"


class TestAThousandClasses:
    """Of which number 7 is taken for 8 always, and the others now and then; those from 990 on have no samples."""

    @pytest.fixture
    def report(self) -> Report:
        matrix = 10 * torch.eye(1000, dtype=torch.int64)
        matrix[torch.arange(100), torch.arange(100) + 500] = torch.arange(100)
        matrix[7, 7], matrix[7, 8] = 0, 40
        matrix[990:] = 0
        names = tuple(f"kind of animal number {index}" for index in range(1000))
        return Report("test", Confusion(matrix, names), Confusion(matrix.flip(0, 1), names))

    def test_the_table_has_the_20_worst_and_says_where_the_others_are(self, report: Report) -> None:
        text = printed(report, width=120)
        assert [line.split()[5] for line in text.splitlines() if "kind of" in line] == [
            "7",
            *map(str, range(99, 80, -1)),
        ]
        assert "│ all " in text
        assert f"{report.adapted.total:,}" in text
        assert "20 of 1,000 classes with the lowest recall; confusion.csv contains all" in text

    def test_the_figures_count_every_sample(self, report: Report, tmp_path: Path) -> None:
        figures = confusion_figures(report)
        texts = [int(text.get_text()) for text in figures["adapted"].axes[0].texts]
        assert sum(texts) == report.adapted.total
        labels = [label.get_text() for label in figures["adapted"].axes[0].get_xticklabels()]
        assert labels[:2] + labels[20:] == ["kind of animal number 7", "kind of animal number 99", "others"]
        for name, figure in figures.items():
            figure.savefig(tmp_path / f"{name}.png")

    def test_the_files_have_all(self, report: Report, tmp_path: Path) -> None:
        paths = write_report(report, tmp_path)
        json_path, csv_path = Path(paths["confusion.json"]), Path(paths["confusion.csv"])
        with csv_path.open() as file:
            assert [row["class"] for row in csv.DictReader(file)] == list(report.adapted.class_names)
        content = json.loads(json_path.read_text())["model"]
        assert content["matrix"] is None
        assert len(content["classes"]) == 1000
        matrix = torch.zeros(1000, 1000, dtype=torch.int64)
        with Path(paths["counts.csv"]).open() as file:
            for row in csv.DictReader(file):
                matrix[int(row["target"]), int(row["predicted"])] = int(row["adapted"])
        assert torch.equal(matrix, report.adapted.matrix)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_printing_never_fails(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    console = Console(file=io.TextIOWrapper(written, encoding=encoding, write_through=True), width=60)
    monkeypatch.setattr("lora_lightning.report.terminal.get_console", lambda: console)
    show("recall 99.4 → 99.2", highlight=False)
    assert written.getvalue().decode(encoding).strip() == f"recall 99.4 {'→' if encoding == 'utf-8' else '?'} 99.2"
