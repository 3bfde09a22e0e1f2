"""Writes and reads the counts of many classes, of which most pairs never occur."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lora_lightning.evaluation import Confusion, Report

_ROWS_AT_ONCE = 100_000


def write_counts(report: Report[Confusion], path: Path) -> None:
    """Write a row for each pair of classes that occurs: their numbers, and the counts of the base and the model."""
    models = {"adapted" if report.base else "model": report.adapted}
    if report.base is not None:
        models = {"base": report.base, **models}
    classes = len(report.adapted.class_names)
    keys = [targets * classes + predicted for targets, predicted, _ in (each.cells for each in models.values())]
    every: Tensor = torch.unique(torch.cat(keys))
    columns = [every // classes, every % classes]
    for own, model in zip(keys, models.values(), strict=True):
        counts = torch.zeros_like(every)
        counts[torch.searchsorted(every, own)] = model.cells[2]
        columns.append(counts)
    with path.open("w", encoding="utf-8") as file:
        file.write(",".join(("target", "predicted", *models)) + "\n")
        for rows in torch.split(torch.stack(columns, 1), _ROWS_AT_ONCE):
            file.writelines(",".join(map(str, row)) + "\n" for row in rows.tolist())


def read_counts(path: Path, classes: int) -> list[Tensor]:
    """Return the sparse matrices in a file of `write_counts`: of the base, if any, and of the model."""
    with path.open(encoding="utf-8") as file:
        columns = file.readline().count(",") + 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no rows
            rows = np.loadtxt(file, dtype=np.int64, delimiter=",", ndmin=2)
    cells = torch.from_numpy(rows).view(-1, columns)
    found = []
    for counts in cells[:, 2:].T:
        places, known = cells[counts > 0, :2].T, counts[counts > 0]
        matrix = torch.sparse_coo_tensor(places, known, (classes, classes), is_coalesced=True, check_invariants=True)
        found.append(matrix)
    return found
