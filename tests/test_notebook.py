"""The notebook in `examples/`: every cell runs, and a notebook shows what a user wants to see."""

from __future__ import annotations

import ast
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT


def last_values(path: Path) -> list[Any]:
    """Run the code cells of a notebook, and return the value of the last line of each, as a notebook shows it."""
    names: dict[str, Any] = {"__name__": "__main__"}
    values = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            tree = ast.parse("".join(cell["source"]))
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, path.name, "exec"), names)  # noqa: S102 - the cells are ours
            values.append(None if last is None else eval(compile(ast.Expression(last.value), path.name, "eval"), names))
    return values


def test_every_cell_runs_and_shows_what_was_trained_and_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook prints them
        _, trained, report, numbers = last_values(ROOT / "examples" / "report.ipynb")
    shown = trained._repr_html_()
    assert "Classifier: what was trained" in shown
    assert "that are frozen" in shown
    assert "on 3 weights: backbone.linear1" in shown
    assert "trained" in str(trained.trained)
    assert "accuracy" in report._repr_html_()
    shares = re.findall(r"<td>(0\.\d+)</td>", report._repr_html_())
    assert shares
    assert all(re.fullmatch(r"0\.0*[1-9]\d{3}|0\.000", each) for each in shares), "numbers of a column are aligned"
    base, adapted, p, broken = numbers
    assert 0.5 < base < 1
    assert 0.5 < adapted < 1
    assert 0 <= p <= 1
    assert len(broken) == report.pairs.broke
    assert list(tmp_path.iterdir()) == []
