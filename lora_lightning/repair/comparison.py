"""Trains and selects the baselines of a repair with the same base, order of batches, augmentation and number of steps."""

from __future__ import annotations

import random

from rich.markup import escape

from lora_lightning.lora.scaling import scaled
from lora_lightning.repair.answers import Tally
from lora_lightning.repair.baselines import Row, comparison_table, write_comparison
from lora_lightning.repair.choice import LAMBDAS, bias_vector, matched_bias, one_bias
from lora_lightning.repair.process import Outcome, Repair, adapted, say
from lora_lightning.repair.task import Way
from lora_lightning.repair.training import Trained
from lora_lightning.repair.verdict import Verdict
from lora_lightning.report import show


def compare(repair: Repair, outcome: Outcome) -> list[Row]:
    """Show the repair and all baselines in a table and a figure, and return the rows of the table."""
    chosen, tested, focus = outcome.setting, outcome.tested, repair.focus
    rank, share = (chosen.rank, chosen.share) if chosen else next(iter(repair.trained))
    assert share is not None, "existing adapters have no budget to compare with"
    repaired = repair.trained[rank, share]
    rows = [
        Row.of("base", tested, tested, focus, 0, 0),
        Row.of("adapters, focus", tested, outcome.repaired, focus, repaired.parameters, repaired.seconds),
    ]
    ways: list[tuple[str, Way, tuple[int, ...] | None]] = [
        ("adapters, no focus", "adapters", None),
        ("full network, focus", "full network", focus),
        ("full network, no focus", "full network", None),
        ("last layer, focus", "last layer", focus),
    ]
    for name, way, what in ways:
        each = repair.train(f"baselines/{name.replace(',', '').replace(' ', '-')}", way, what, share, rank)
        answers = repair.runs.answers(each.model, repair.data, "test")
        rows.append(Row.of(name, tested, answers, focus, each.parameters, each.seconds))
    validated = repair.validated
    left = repair.runs.answers(repaired.model, repair.data, "validate").tally(focus).focus_errors
    for name, bias, count in (
        ("one bias", one_bias(validated, focus), 1),
        ("one bias, matched", matched_bias(validated, focus, left), 1),
        ("bias vector", bias_vector(validated), len(repair.task.names)),
    ):
        rows.append(Row.of(name, tested, tested.biased(bias), focus, count, 0))
    show(comparison_table(rows, repair.called))
    say(
        f"In place of the worst {repair.task.noun}, a random one, at scale 1: {escape(_random_class(repair, outcome, rank, share))}"
    )
    top = chosen.scale if chosen else 1.0
    write_comparison(rows, {"adapters, scale 0 to 1": _curve(repair, repaired, top)}, repair.called, repair.runs.folder)
    say(f"Trade-off: {escape(str(repair.runs.folder / 'tradeoff.png'))}")
    return rows


def _random_class(repair: Repair, outcome: Outcome, rank: int, share: float) -> str:
    """Repair a random class, since the worst of several classes is expected to improve in a second measurement."""
    others = [index for index in range(len(repair.task.names)) if index not in repair.focus]
    other = (random.Random(repair.settings.seed).choice(others),)
    each = repair.train("baselines/random-class", "adapters", other, share, rank)
    after = repair.runs.answers(each.model, repair.data, "test")
    return Verdict(repair.task.names[other[0]], outcome.tested.tally(other), after.tally(other)).in_words()


def _curve(repair: Repair, repaired: Trained, top: float) -> list[Tally]:
    """Return the errors on test data at each scale of the adapters for the figure. `top` is the current scale."""
    tallies = []
    for scale in (0.0, *LAMBDAS):
        with scaled(adapted(repaired), scale / top):
            tallies.append(repair.runs.answers(repaired.model, repair.data, "test").tally(repair.focus))
    return tallies
