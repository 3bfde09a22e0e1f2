"""Puts lists into words."""

from __future__ import annotations

from collections.abc import Iterable


def some_of(words: Iterable[str], shown: int = 5) -> str:
    """Return the first words and the number of further ones."""
    words = list(words)
    return ", ".join(words[:shown]) + (f" and {len(words) - shown} more" if len(words) > shown else "")
