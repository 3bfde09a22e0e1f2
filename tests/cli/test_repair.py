"""`lora-lightning repair` on the embedded sample."""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_lightning import MNISTDataModule, RichBoyNet, load_adapter
from lora_lightning.cli.init import init
from lora_lightning.repair import process
from lora_lightning.repair.choice import LAMBDAS
from tests.conftest import ROOT

Run = Callable[..., tuple[int, str]]


def numbers(text: str) -> tuple[int, int, int, int, float, float]:
    """Errors on the digit before and after, on the others before and after, accuracy before and after."""
    match = re.search(r"rrors on \d (\d+) → (\d+), on all others (\d+) → (\d+); accuracy ([\d.]+)% → ([\d.]+)%", text)
    assert match, text
    return *map(int, match.groups()[:4]), *map(float, match.groups()[4:])


def weak_base(folder: Path) -> Path:
    """A base that has seen few sevens."""
    shutil.copy(_weak_base(), folder / "weak.ckpt")
    return folder / "weak.ckpt"


@functools.cache
def _weak_base() -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    from lightning.pytorch import Trainer

    from lora_lightning import Classifier

    torch.manual_seed(0)
    data = MNISTDataModule(source="sample", focus=[7], focus_fraction=0.02, batch_size=50)
    trainer = Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, limit_val_batches=0)
    trainer.fit(Classifier(RichBoyNet()), datamodule=data)
    trainer.save_checkpoint(folder / "weak.ckpt")
    return folder / "weak.ckpt"


def test_a_weak_digit_is_found_and_repaired(run: Run, workspace: Path) -> None:
    (workspace / "configs").unlink()  # as outside a clone of the project
    base = weak_base(workspace)
    code, text = run("repair", "--source", "sample", "--base_checkpoint", str(base), "--steps", "200")
    assert code == 0, text
    assert "2. Weak digit: 7 (recall" in text
    assert "4. Verdict: repaired:" in text
    before, after, others_before, others_after, accuracy_before, accuracy_after = numbers(text)
    assert after <= before / 2
    assert others_after <= others_before
    assert accuracy_after > accuracy_before
    assert "Trained: 54,352 parameters, 1.936% of the 2,807,010 that are frozen, in " in text
    assert "Base bitwise unchanged: yes" in text

    (logs,) = Path("logs/repair").iterdir()
    content = json.loads((logs / "adapted" / "confusion.json").read_text())
    assert content["base"]["errors"] == before + others_before
    assert content["model"]["errors"] == after + others_after
    net = RichBoyNet()
    state = torch.load(base, weights_only=True)["state_dict"]
    net.load_state_dict({key.removeprefix("backbone."): value for key, value in state.items()})
    assert load_adapter(net, logs / "adapter", strict=True) == ["linear1", "linear2", "linear3"]
    data = MNISTDataModule(source="sample")
    data.prepare_data()
    data.setup("test")
    wrong = 0
    for batch in data.test_dataloader():
        images, targets = data.on_after_batch_transfer(batch, 0)
        wrong += int((net.eval()(images).argmax(1) != targets).sum())
    assert wrong == after + others_after  # the folder has the scale that was chosen

    page, facts = (
        (logs / "adapted" / "report.html").read_text().replace("\u00a0", " "),
        json.loads((logs / "adapted" / "run.json").read_text()),
    )
    assert f"Repaired: {before} → {after} errors on digit 7" in page
    assert facts["repair"]["outcome"] == "repaired"
    report, command = (re.search(rf"^{name} +(.*)$", text, re.MULTILINE)[1] for name in ("report", "next"))
    assert "McNemar" in Path(report).read_text()
    assert str(ROOT) not in command, "the command works wherever the package is"
    first, _, second = command.partition(" && ")
    assert first == "lora-lightning init mnist"  # since the example is not here
    assert init(["mnist"]) == 0
    program, *words = shlex.split(second)
    assert program == "lora-lightning"
    code, tested = run(*words)
    assert code == 0, tested
    assert re.search(rf"│ +all │ +2,000 │ +{before + others_before} │ +{wrong} │", tested)


def test_without_a_base_one_is_trained_and_nothing_is_called_a_repair_that_is_none(run: Run, workspace: Path) -> None:
    code, text = run("repair", "--source", "sample", "--focus", "4,9", "--steps", "20", "--share", "0.9")
    assert "1. Base: training the over-sized MLP on all ten digits for 4 epochs." in text
    assert "2. Weak digit: 4 and 9 (as asked)." in text
    words = {0: "repaired:|improved,", 3: "traded:", 4: "no", 5: r"fewer errors, within chance \(p = 0\."}[code]
    assert re.search(rf"4\. Verdict: ({words})", text)
    assert bool(re.search("^adapter  ", text, re.MULTILINE)) == ("Chosen on validation data" in text)


@pytest.mark.slow  # tests/cli/test_configured_repair.py compares with them, too
def test_baselines_stand_beside_it_in_a_table_and_in_files(run: Run, workspace: Path) -> None:
    base = weak_base(workspace)
    words = (
        "repair",
        "--source",
        "sample",
        "--base_checkpoint",
        str(base),
        "--steps",
        "60",
        "--rank",
        "[1,4]",
        "--baselines",
        "true",
    )
    code, text = run(*words)
    assert code == 0, text
    (logs,) = Path("logs/repair").iterdir()
    rows = {row["name"]: row for row in json.loads((logs / "baselines.json").read_text())["rows"]}
    assert text.count("tradeoff.png") == 1
    trained = [line.partition(": ")[2] for line in text.splitlines() if line.startswith("Baseline: ")]
    assert trained == [f"{name}." for name, row in rows.items() if row["parameters"] > 1 and name != "adapters, focus"]
    assert list(rows) == [
        "base",
        "adapters, focus",
        "adapters, no focus",
        "full network, focus",
        "full network, no focus",
        "last layer, focus",
        "one bias",
        "one bias, matched",
    ]
    assert all(name in text for name in rows)
    before, after, _, others_after, *_ = numbers(text)
    assert rows["base"]["tally"]["focus_errors"] == before
    assert rows["base"]["p"] == 1
    ours = rows["adapters, focus"]["tally"]
    assert (ours["focus_errors"], ours["other_errors"]) == (after, others_after)
    assert rows["full network, focus"]["parameters"] == 2_807_010
    assert rows["last layer, focus"]["parameters"] == 20_010
    assert (logs / "tradeoff.png").stat().st_size > 10_000
    assert len((logs / "baselines.csv").read_text().splitlines()) == 1 + len(rows)


def test_nothing_is_chosen_by_test_data(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    choose, test_dataloader = process.choose, MNISTDataModule.test_dataloader

    def chosen(*given: Any) -> Any:
        events.append("chosen")
        assert len(given[1]) == 2 * len(LAMBDAS)
        return choose(*given)

    def tested(self: MNISTDataModule) -> Any:
        events.append("test data")
        return test_dataloader(self)

    monkeypatch.setattr(process, "choose", chosen)
    monkeypatch.setattr(MNISTDataModule, "test_dataloader", tested)
    run("repair", "--source", "sample", "--steps", "10", "--rank", "[1,2]")
    assert events.index("chosen") < events.index("test data")


@pytest.mark.slow
def test_several_seeds_end_with_their_median(run: Run, workspace: Path) -> None:
    base = weak_base(workspace)
    code, text = run("repair", "--source", "sample", "--base_checkpoint", str(base), "--steps", "40", "--seeds", "2")
    assert code in (0, 3, 5)
    assert "Seed 0" in text
    assert "Seed 1" in text
    assert re.search(r"2 seeds: errors on the digit cut by \d+% in the median \(\d+% to \d+%\)", text), text
    assert len(list(Path("logs/repair").iterdir())) == 2


@pytest.mark.slow
def test_a_terminal_that_lacks_characters_loses_no_table_and_no_file(workspace: Path) -> None:
    base = weak_base(workspace)
    words = ["repair", "--source", "sample", "--base_checkpoint", str(base), "--steps", "60"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    with Path("out.txt").open("wb") as out:
        command = [sys.executable, "-m", "lora_lightning", *words]
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    text = Path("out.txt").read_text(encoding="cp1252")
    assert code == 0, text
    assert re.search(r"all \|\s+2,000 \|", text), text
    assert "4. Verdict: repaired: errors on 7" in text
    (logs,) = Path("logs/repair").iterdir()
    assert (logs / "adapted" / "confusion.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--focus", "12"],
            "focus=12: '12' is not a class: expected 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, worst or worst-pair.",
        ),
        (["--focus", "0,1,2,3,4,5,6,7,8,9"], "leaves no other class to mix in"),
        (["--rank", "0"], "rank=0: a LoRA rank"),
        (["--rank", "[]"], "rank=[], share=None: expected at least one of each."),
        (["--share", "1.5"], "focus_fraction=1.5: expected a share above 0 and below 1"),
        (["--steps", "0"], "steps=0: expected at least 1"),
        (["--seeds", "0"], "seeds=0: expected at least 1"),
        (["--source", "mine"], "Got value: mine"),
        (["--base_checkpoint", "no"], "no does not exist"),
        (["--fokus", "1"], "--fokus"),
    ],
)
def test_bad_input_ends_it_before_the_long_work(run: Run, words: list[str], message: str) -> None:
    code, text = run("repair", "--source", "sample", *words)
    assert code in (1, 2)
    assert message in text
    assert not Path("logs").exists()


@pytest.mark.parametrize(
    ("disabled", "unchanged", "broken"),
    [
        ([9, 5], True, []),
        ([9, 5], False, ["the frozen base changed."]),
        ([9, 4], True, ["with disabled adapters, the model makes [9, 4] errors per class, and the base [9, 5]."]),
    ],
)
def test_each_guarantee_that_does_not_hold_is_named(disabled: list[int], unchanged: bool, broken: list[str]) -> None:
    assert process.broken_guarantees(unchanged, disabled, [9, 5]) == broken


def test_the_exit_code_says_that_a_guarantee_is_broken(
    run: Run, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = weak_base(workspace)
    monkeypatch.setattr(process, "base_fingerprint", lambda module: "something else")
    code, text = run("repair", "--source", "sample", "--base_checkpoint", str(base), "--steps", "5")
    assert code == 1
    assert "Broken guarantee: the frozen base changed." in text
    assert "Base bitwise unchanged: NO" in text
