"""Decides whether a repair succeeded."""

from __future__ import annotations

from dataclasses import dataclass

from lora_lightning.repair.predictions import Tally

REPAIRED, TRADED, KEPT = 0, 3, 4
"""Exit codes of the three outcomes. Errors have the codes 1 and 2."""


@dataclass(frozen=True)
class Verdict:
    """Compares a base with the repaired model on test data.

    Args:
        focus: Names of the classes in focus.
        base: Errors of the base.
        repaired: Errors of the adapted model, or `None` if no candidate was better than the base on validation data.
    """

    focus: str
    base: Tally
    repaired: Tally | None

    @property
    def exit_code(self) -> int:
        """Return `REPAIRED` for fewer errors on the focus and no more on others, `TRADED` for more, else `KEPT`."""
        if self.repaired is None or self.repaired.focus_errors >= self.base.focus_errors:
            return KEPT
        return REPAIRED if self.repaired.other_errors <= self.base.other_errors else TRADED

    def in_words(self) -> str:
        """Return the outcome as one sentence, with the numbers."""
        base, repaired = self.base, self.repaired
        if repaired is None:
            return (
                f"no repair found on validation data, base kept: {base.focus_errors} errors on {self.focus}, "
                f"{base.other_errors} on others."
            )
        numbers = (
            f"errors on {self.focus} {base.focus_errors} → {repaired.focus_errors}, on all others "
            f"{base.other_errors} → {repaired.other_errors}; accuracy {base.accuracy:.2%} → {repaired.accuracy:.2%}; "
            f"others taken for {self.focus} {base.false_positives} → {repaired.false_positives}."
        )
        if self.exit_code == REPAIRED:
            return f"repaired: {numbers}"
        if self.exit_code == TRADED:
            less, more = base.focus_errors - repaired.focus_errors, repaired.other_errors - base.other_errors
            return f"traded: −{less} on {self.focus}, +{more} elsewhere. Not a repair: {numbers}"
        return (
            "not repaired, use the base: the improvement on validation data does not hold on test data. "
            f"{numbers[0].upper()}{numbers[1:]}"
        )
