"""Prints to the terminal without encoding errors."""

from __future__ import annotations

from typing import Any

from rich import get_console
from rich.console import RenderableType


def show(what: RenderableType, **options: Any) -> None:
    """Print to standard output, with question marks for characters that its encoding lacks.

    Args:
        what: A text or a table.
        options: Options of `rich.console.Console.print`.
    """
    console = get_console()
    encoding = getattr(console.file, "encoding", None) or "utf-8"
    if console.encoding.startswith("utf"):
        console.print(what, **options)
        return
    with console.capture() as captured:
        console.print(what, **options)
    console.file.write(captured.get().encode(encoding, "replace").decode(encoding))


def show_sentence(text: str) -> None:
    """Print a sentence. A terminal gets it wrapped between words, and a file on one line."""
    show(text, markup=False, highlight=False, soft_wrap=not get_console().is_terminal)
