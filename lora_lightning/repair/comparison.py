"""Trains and selects the baselines of a repair with the same base, batches, augmentation and number of steps."""

from __future__ import annotations

from lora_lightning.lora import scaled
from lora_lightning.repair.baselines import Row, comparison_table, write_comparison
from lora_lightning.repair.choice import LAMBDAS, matched_bias, one_bias
from lora_lightning.repair.predictions import Tally
from lora_lightning.repair.process import Outcome, Repair, say
from lora_lightning.repair.task import Method
from lora_lightning.repair.training import Trained
from lora_lightning.report.terminal import show


def compare(repair: Repair, outcome: Outcome) -> list[Row]:
    """Show the repair and all baselines in a table and a figure, and return the rows of the table."""
    chosen, tested, focus = outcome.setting, outcome.tested, repair.focus
    rank, share = (chosen.rank, chosen.share) if chosen else next(iter(repair.trained))
    repaired = repair.trained[rank, share]
    rows = [
        Row.of("base", tested, tested, focus, 0, 0),
        Row.of("adapters, focus", tested, outcome.repaired, focus, repaired.parameters, repaired.seconds),
    ]
    methods: list[tuple[str, Method, tuple[int, ...] | None]] = [
        ("adapters, no focus", "adapters", None),
        ("full network, focus", "full network", focus),
        ("full network, no focus", "full network", None),
        ("last layer, focus", "last layer", focus),
    ]
    for name, method, classes in methods:
        say(f"[bold]Baseline[/]: {name}.")
        part = f"baselines/{name.replace(',', '').replace(' ', '-')}"
        baseline = repair.train(part, method, classes, share, rank)
        predictions = repair.runs.predict(baseline.model, repair.data, "test")
        rows.append(Row.of(name, tested, predictions, focus, baseline.parameters, baseline.seconds))
    validated = repair.validated
    left = repair.runs.predict(repaired.model, repair.data, "validate").tally(focus).focus_errors
    for name, bias in (
        ("one bias", one_bias(validated, focus)),
        ("one bias, matched", matched_bias(validated, focus, left)),
    ):
        rows.append(Row.of(name, tested, tested.biased(bias), focus, parameters=1, seconds=0))
    show(comparison_table(rows, repair.called))
    top = chosen.scale if chosen else 1.0
    write_comparison(rows, {"adapters, scale 0 to 1": _curve(repair, repaired, top)}, repair.called, repair.runs.folder)
    return rows


def _curve(repair: Repair, repaired: Trained, top: float) -> list[Tally]:
    """Return the errors on test data at all scales of the adapters for the figure. `top` is the current scale."""
    tallies = []
    for scale in (0.0, *LAMBDAS):
        with scaled(repaired.adapted, scale / top):
            tallies.append(repair.runs.predict(repaired.model, repair.data, "test").tally(repair.focus))
    return tallies
