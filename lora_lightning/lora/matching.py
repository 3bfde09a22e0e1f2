"""Matches dotted names of layers and parameters against patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from time import perf_counter
from typing import TypeVar

import regex

V = TypeVar("V")

_SECONDS = 1.0
"""Time after which matching is given up. Patterns may come from an adapter folder of a stranger."""
_SLOW = 0.01
"""Time of a match that counts towards this. A match takes microseconds, and there may be thousands of names."""


class Names:
    """Matches dotted names against patterns.

    A string is a regular expression for the full name. A list holds names, each of which also matches as the end of a
    longer name after a dot. The keys of a mapping, such as a `rank_pattern`, are regular expressions for a name or for
    such an end of it.

    Args:
        patterns: The patterns.

    Raises:
        ValueError: If an expression is not valid.
    """

    def __init__(self, patterns: str | list[str] | Mapping[str, object]) -> None:
        self._patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        self._by_end = isinstance(patterns, Mapping)
        self._literals: dict[str, int] = {}  # a look-up for literal names, of which there may be thousands
        self._expressions: list[tuple[int, regex.Pattern[str]]] = []
        self._seconds = 0.0
        for index, pattern in enumerate(self._patterns):
            name = re.sub(r"\\(.)", r"\1", pattern) if self._by_end else pattern
            if isinstance(patterns, list) or (name and self._by_end and re.escape(name) == pattern):
                self._literals.setdefault(name, index)
            else:
                self._expressions.append((index, _compiled(pattern)))

    def match(self, *names: str) -> bool:
        """Return whether any pattern matches one of these names."""
        return self.first(*names) is not None

    def first(self, *names: str) -> str | None:
        """Return the first pattern that matches one of these names."""
        if not self._patterns:
            return None
        ends = [end for name in names for end in (endings(name) if self._by_end else (name,))]
        found = [index for index, expression in self._expressions if self._any_matches(expression, ends)][:1]
        found += [self._literals[end] for name in names for end in endings(name) if end in self._literals]
        return self._patterns[min(found)] if found else None

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Return the patterns that match none of these names."""
        names = set(names)
        ends = {end for name in names for end in endings(name)}
        missing = [index for name, index in self._literals.items() if name not in ends]
        ends = ends if self._by_end else names
        missing += [index for index, expression in self._expressions if not self._any_matches(expression, ends)]
        return [self._patterns[index] for index in sorted(missing)]

    def _any_matches(self, expression: regex.Pattern[str], names: Iterable[str]) -> bool:
        try:
            return any(self._matches(expression, name) for name in names)
        except TimeoutError:
            raise ValueError(
                f"The pattern {expression.pattern!r} takes more than {_SECONDS:g} s to match the names. Write it "
                "without repetitions inside repetitions, or list the names."
            ) from None

    def _matches(self, expression: regex.Pattern[str], name: str) -> bool:
        start = perf_counter()
        found = expression.fullmatch(name, timeout=_SECONDS) is not None
        took = perf_counter() - start
        if took > _SLOW:
            self._seconds += took
        if self._seconds > _SECONDS:
            raise TimeoutError
        return found


def endings(name: str) -> list[str]:
    """Return a dotted name and each of its ends after a dot: `a.b.c`, `b.c`, `c`."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def exactly(names: Iterable[str], among: Iterable[str]) -> str | list[str]:
    """Return patterns that match exactly these names `among` all names: a list if possible, else an expression."""
    names = list(names)
    selected, listed = set(names), Names(names)
    if all(name in selected for name in among if listed.match(name)):
        return names
    return "|".join(map(literally, names)) or literally("")


def literally(name: str) -> str:
    """Return an expression for this name alone, which is empty for a module that is itself adapted."""
    return re.escape(name) or "(?:)"


def pattern_of(values: Mapping[str, V], default: V | None) -> dict[str, V]:
    """Return the values that differ from `default`, by regular expressions for the names.

    An expression also matches longer names with this suffix. Such a layer gets its own expression, and the longest ones
    come first.
    """
    names = {name for name, value in values.items() if value != default}
    names |= {name for name in values if any(ending in names for ending in endings(name))}
    return {literally(name): values[name] for name in sorted(names, key=lambda name: (-len(name), name))}


def _compiled(pattern: str) -> regex.Pattern[str]:
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}.") from None
