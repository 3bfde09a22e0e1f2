"""Puts lists and names into words."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from textwrap import fill


def some_of(words: Iterable[str], shown: int = 5) -> str:
    """Return the first words and the number of further ones."""
    words = list(words)
    return ", ".join(words[:shown]) + (f" and {len(words) - shown} more" if len(words) > shown else "")


def as_typed(path: str | Path) -> str:
    """Return a path relative to the working directory, if it is below that. A URL stays as it is."""
    if "://" in str(path):
        return str(path)
    whole = Path(path).absolute()
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else str(path)


def for_log(text: str) -> str:
    """Return a message wrapped between words, if standard error, which gets what is logged, is a terminal."""
    if not sys.stderr.isatty():
        return text
    return fill(text, shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False)


def one_line(name: str, longest: int) -> str:
    """Return a name on one line of limited length, without characters that a terminal or a font interprets."""
    plain = "".join(sign if sign.isprintable() else "�" for sign in name[: longest + 1])
    return plain if len(plain) <= longest else f"{plain[: longest - 1]}…"
