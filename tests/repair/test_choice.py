"""How a repair is chosen, and what it is called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_lightning.evaluation import Confusion
from lora_lightning.repair.choice import choose, classes_in_focus, matched_bias, one_bias
from lora_lightning.repair.predictions import Predictions, Tally, mcnemar
from lora_lightning.repair.verdict import KEPT, REPAIRED, TRADED, WITHIN_CHANCE, Verdict

BASE = Tally(focus_errors=20, other_errors=100, false_positives=10, total=1000)


def predicted(targets: list[int], classes: list[int]) -> Predictions:
    return Predictions(torch.nn.functional.one_hot(torch.tensor(classes), 3).float(), torch.tensor(targets))


def test_errors_are_counted_for_the_classes_in_focus() -> None:
    found = predicted([0, 0, 0, 1, 1, 2, 2], [0, 1, 2, 1, 0, 0, 1])
    assert found.tally((0,)) == Tally(focus_errors=2, other_errors=3, false_positives=2, total=7)
    assert found.tally((0, 1)) == Tally(focus_errors=3, other_errors=2, false_positives=2, total=7)
    assert found.tally((0,)).accuracy == pytest.approx(2 / 7)
    assert found.confusion(("a", "b", "c")).matrix.tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0]]


@pytest.mark.parametrize(
    ("candidates", "kept"),
    [
        ({"better": Tally(10, 90, 10, 1000), "best": Tally(8, 95, 12, 1000)}, "best"),
        ({"trades": Tally(2, 101, 10, 1000), "better": Tally(19, 100, 10, 1000)}, "better"),
        ({"takes all for it": Tally(2, 90, 29, 1000), "better": Tally(19, 100, 11, 1000)}, "better"),
        (
            {"corrects as many as it takes": Tally(2, 90, 28, 1000), "better": Tally(19, 100, 11, 1000)},
            "corrects as many as it takes",
        ),
        ({"worse elsewhere": Tally(8, 95, 10, 1000), "better": Tally(8, 90, 10, 1000)}, "better"),
        ({"no better": Tally(20, 50, 5, 1000)}, None),
        ({}, None),
    ],
)
def test_the_rule(candidates: dict[str, Tally], kept: str | None) -> None:
    assert choose(BASE, candidates) == kept


@pytest.mark.parametrize(
    ("repaired", "code", "words"),
    [
        (
            Tally(10, 100, 12, 1000),
            REPAIRED,
            "repaired: errors on 9 20 → 10, on all others 100 → 100; accuracy 88.00% → 89.00%",
        ),
        (Tally(3, 145, 12, 1000), TRADED, "traded: −17 on 9, +45 elsewhere. Not a repair: errors on 9 20 → 3"),
        (
            Tally(20, 50, 12, 1000),
            KEPT,
            "not repaired, use the base: the improvement on validation data does not hold on test data.",
        ),
        (None, KEPT, "no repair found on validation data, base kept: 20 errors on 9, 100 on others."),
    ],
)
def test_a_trade_is_never_called_a_repair(repaired: Tally | None, code: int, words: str) -> None:
    verdict = Verdict("9", BASE, repaired, p=0.05)
    assert verdict.exit_code == code
    assert words in verdict.in_words()


def test_what_chance_explains_is_not_called_a_repair() -> None:
    verdict = Verdict("9", BASE, Tally(16, 94, 12, 1000), p=0.076)
    assert verdict.exit_code == WITHIN_CHANCE == 5
    assert verdict.in_words().startswith("fewer errors, within chance (p = 0.076): errors on 9 20 → 16, on all others")
    assert Verdict("9", BASE, Tally(16, 94, 12, 1000)).exit_code == WITHIN_CHANCE
    assert Verdict("9", BASE, Tally(3, 145, 12, 1000), p=0.9).exit_code == TRADED


def test_fewer_errors_elsewhere_alone_are_an_improvement_and_no_repair_of_the_class() -> None:
    verdict = Verdict("9", BASE, Tally(18, 60, 12, 1000), p=0.001, p_of_focus=0.73)
    assert (verdict.outcome, verdict.exit_code) == ("improved", REPAIRED)
    assert verdict.in_words().startswith("improved, but on 9 alone within chance: errors on 9 20 → 18, on all others")
    assert Verdict("9", BASE, Tally(10, 90, 12, 1000), p=0.001, p_of_focus=0.05).outcome == "repaired"


def test_the_focus_may_be_found_or_named() -> None:
    confusion = Confusion(torch.tensor([[50, 0, 5], [4, 90, 0], [4, 2, 80]]), ("cat", "dog", "owl"))
    assert classes_in_focus("worst", confusion) == ((0,), "recall 90.9% on 235 validation samples")
    assert classes_in_focus("worst-pair", confusion) == (
        (0, 2),
        "taken for each other 9 times on 235 validation samples",
    )
    assert classes_in_focus("owl, cat", confusion)[0] == (2, 0)
    with pytest.raises(ValueError, match="'bat' is not a class: expected cat, dog, owl, worst or worst-pair"):
        classes_in_focus("bat", confusion)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    truth = [0] * 20
    before = predicted(truth, [0] * 12 + [1] * 8)
    after = predicted(truth, [1] * 2 + [0] * 18)  # breaks 2, mends 8
    # scipy.stats.binomtest(2, 10).pvalue
    assert mcnemar(before, after) == pytest.approx(0.109375)
    assert mcnemar(before, before) == 1
    assert mcnemar(after, before) == mcnemar(before, after)


def near_the_border(seed: int) -> Predictions:
    """Class 0 is missed by a little, the others are seen."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(600) % 3
    logits = torch.nn.functional.one_hot(targets, 3) * 4.0 + torch.randn(600, 3, generator=generator)
    return Predictions(logits - torch.tensor([3.0, 0.0, 0.0]), targets)


def test_biases_are_chosen_by_the_same_rule(capsys: pytest.CaptureFixture[str]) -> None:
    validated = near_the_border(0)
    base = validated.tally((0,))

    def errors(bias: Tensor) -> Tally:
        return validated.biased(bias).tally((0,))

    matched = matched_bias(validated, (0,), 10)
    assert errors(matched).focus_errors <= 10 < base.focus_errors
    assert errors(matched - torch.tensor([0.1, 0, 0])).focus_errors > 10
    chosen = one_bias(validated, (0,))
    assert chosen[1:].tolist() == [0, 0]
    assert errors(chosen).other_errors <= base.other_errors
