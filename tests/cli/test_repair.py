"""`lora-lightning repair`, on the embedded sample and on the full MNIST."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_lightning import RichBoyNet, load_adapter
from lora_lightning.cli.repair import _Outcome
from lora_lightning.report import Confusion

Run = Callable[..., tuple[int, str]]


def outcome(text: str) -> tuple[int, int, int, int, float, float]:
    """Errors on the digit before and after, on the others before and after, accuracy before and after."""
    match = re.search(r"errors on \d (\d+) → (\d+), on all others (\d+) → (\d+); accuracy ([\d.]+)% → ([\d.]+)%", text)
    assert match, text
    return *map(int, match.groups()[:4]), *map(float, match.groups()[4:])


def test_the_whole_story_on_the_sample(run: Run, workspace: Path) -> None:
    code, text = run("repair", "--source", "sample")
    assert code == 0, text
    before, after, others_before, others_after, accuracy_before, accuracy_after = outcome(text)
    assert after <= before / 2
    assert others_after <= others_before
    assert accuracy_after > accuracy_before
    assert "Trained: 6,794 of 2,813,804 parameters, 0.242% of the base." in text
    assert "Base bitwise unchanged: yes" in text
    assert "errors" in text

    (logs,) = Path("logs/repair").iterdir()
    content = json.loads((logs / "adapted" / "confusion.json").read_text())
    assert content["base"]["errors"] == before + others_before
    assert content["model"]["errors"] == after + others_after
    base = logs / "base" / "checkpoints" / "base.ckpt"
    net = RichBoyNet()
    state = torch.load(base, weights_only=True)["state_dict"]
    net.load_state_dict({key.removeprefix("backbone."): value for key, value in state.items()})
    assert load_adapter(net, logs / "adapted" / "adapter", strict=True) == ["linear1", "linear2", "linear3"]

    code, text = run("repair", "--source", "sample", "--base_checkpoint", str(base), "--focus", "9", "--steps", "50")
    assert code == 0, text
    assert "2. Weak digit: 9 (as asked)." in text
    assert f"1. Base: {base}" in text
    assert len(list(Path("logs/repair").iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--focus", "12"], "focus=[12]: 12 is not a digit"),
        (["--rank", "0"], "rank=0: a LoRA rank"),
        (["--steps", "0"], "steps=0: expected at least 1"),
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


def confusion(*errors: int) -> Confusion:
    import torch

    matrix = torch.diag(torch.tensor([100 - count for count in errors]))
    for index, count in enumerate(errors):
        matrix[index, (index + 1) % len(errors)] += count
    return Confusion(matrix, tuple(map(str, range(len(errors)))))


@pytest.mark.parametrize(
    ("base", "adapted", "disabled", "unchanged", "broken"),
    [
        ((9, 5), (2, 5), [9, 5], True, []),
        ((9, 5), (2, 5), [9, 5], False, ["the frozen base changed."]),
        ((9, 5), (2, 5), [9, 4], True, ["with its adapters off the model makes [9, 5] errors, the base [9, 4]."]),
        ((9, 5), (9, 4), [9, 5], True, ["the errors on 0 did not fall (9 → 9)."]),
        ((9, 5), (2, 13), [9, 5], True, ["the accuracy fell. More steps, or another seed, may help."]),
    ],
)
def test_each_promise_that_does_not_hold_is_named(
    base: tuple[int, ...], adapted: tuple[int, ...], disabled: list[int], unchanged: bool, broken: list[str]
) -> None:
    result = _Outcome(confusion(*base), confusion(*adapted), 0, disabled, unchanged)
    assert result.broken_promises() == broken


def test_the_exit_code_says_that_a_promise_is_broken(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_lightning.cli.repair.base_fingerprint", lambda module: "something else")
    code, text = run("repair", "--source", "sample", "--focus", "9", "--steps", "30")
    assert code == 1
    assert "Broken promise: the frozen base changed." in text
    assert "Base bitwise unchanged: NO" in text
