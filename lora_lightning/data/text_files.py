"""Reads labelled texts from CSV, TSV and JSONL files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_READ = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".ndjson": ""}


def read_texts(path: Path, text_column: str, label_column: str | None) -> tuple[list[str], list[str]]:
    """Return the texts in a file and their labels.

    Args:
        path: A CSV or TSV file with a header, or a JSONL file with one object per line, in UTF-8.
        text_column: Column or key of the texts.
        label_column: Column or key of the labels, which are converted to strings. `None` reads no labels.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file has another format, lacks the column, has no rows, or if a text is empty. The message
            names the row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected texts as .csv, .tsv or .jsonl.")
    if path.suffix.lower() not in _READ:
        raise ValueError(f"{path} has an unknown file type; expected one of {', '.join(_READ)}.")
    texts: list[str] = []
    labels: list[str] = []
    try:
        for number, row in _rows(path):
            for column in filter(None, (text_column, label_column)):
                if row.get(column) is None:
                    known = ", ".join(repr(key) for key in row if key is not None)
                    raise ValueError(f"{path}, row {number}, has no {column!r}. Its columns: {known}.")
            if not str(row[text_column]).strip():
                raise ValueError(f"{path}, row {number}, has an empty {text_column!r}. Add a text, or remove the row.")
            texts.append(str(row[text_column]))
            labels += [str(row[label_column])] if label_column else []
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}). Save it as UTF-8.") from None
    if not texts:
        raise ValueError(f"{path} has no rows; expected one text per row, in the column {text_column!r}.")
    return texts, labels


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the rows with their numbers, which start at 1."""
    delimiter = _READ[path.suffix.lower()]
    with path.open(encoding="utf-8-sig", newline="") as file:
        if delimiter:
            yield from enumerate(csv.DictReader(file, delimiter=delimiter), 1)
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is not JSON ({error}).") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}, is a {type(row).__name__}; expected an object.")
            yield number, row
