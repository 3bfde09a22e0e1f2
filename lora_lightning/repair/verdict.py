"""Decides whether a repair succeeded."""

from __future__ import annotations

from dataclasses import dataclass

from lora_lightning.repair.predictions import Tally

REPAIRED, TRADED, KEPT, WITHIN_CHANCE = 0, 3, 4, 5
"""Exit codes of the outcomes. Errors have the codes 1 and 2."""
LIKELY = 0.05
"""The largest p-value of a difference that chance does not explain."""


@dataclass(frozen=True)
class Verdict:
    """Compares a base with the repaired model on test data.

    Args:
        focus: Names of the classes in focus.
        base: Errors of the base.
        repaired: Errors of the adapted model, or `None` if no candidate was better than the base on validation data.
        p: P-value of McNemar's exact test for equal error rates on all test samples, or `None` without a repair.
        p_of_focus: P-value of the same test on the samples of the focus alone, or `None` if it was not made.
    """

    focus: str
    base: Tally
    repaired: Tally | None
    p: float | None = None
    p_of_focus: float | None = None

    @property
    def exit_code(self) -> int:
        """Return the exit code.

        `REPAIRED` means fewer errors on the focus and no more on others, and that chance does not explain the
        difference on all samples. It is `WITHIN_CHANCE` if chance explains that, `TRADED` for more errors on others,
        and `KEPT` if the errors on the focus did not fall.
        """
        if self.repaired is None or self.repaired.focus_errors >= self.base.focus_errors:
            return KEPT
        if self.repaired.other_errors > self.base.other_errors:
            return TRADED
        return REPAIRED if self.p is not None and self.p <= LIKELY else WITHIN_CHANCE

    @property
    def outcome(self) -> str:
        """Return the outcome in one or two words.

        "improved" has the exit code of "repaired": chance does not explain the difference on all samples, but that on
        the focus alone.
        """
        if self.exit_code == REPAIRED:
            return "repaired" if self.p_of_focus is None or self.p_of_focus <= LIKELY else "improved"
        if self.exit_code == TRADED:
            return "traded"
        return "kept" if self.exit_code == KEPT else "within chance"

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
            alone = "" if self.outcome == "repaired" else f", but on {self.focus} alone within chance"
            return f"{self.outcome}{alone}: {numbers}"
        if self.exit_code == WITHIN_CHANCE:
            of_test = "p unknown" if self.p is None else f"p = {self.p:.2g}"
            return f"fewer errors, within chance ({of_test}): {numbers}"
        if self.exit_code == TRADED:
            less, more = base.focus_errors - repaired.focus_errors, repaired.other_errors - base.other_errors
            return f"traded: −{less} on {self.focus}, +{more} elsewhere. Not a repair: {numbers}"
        return (
            "not repaired, use the base: the improvement on validation data does not hold on test data. "
            f"{numbers[0].upper()}{numbers[1:]}"
        )
