"""Sums that do not depend on how rows are distributed over batches and devices."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from lora_lightning.evaluation.exact_sums import ExactSums, product, squared_deviations


def summed(rows: Tensor, size: int, devices: int = 1) -> Tensor:
    parts = [ExactSums(rows.shape[1]) for _ in range(devices)]
    for number, batch in enumerate(rows.split(size)):
        parts[number % devices].add(batch)
    for other in parts[1:]:
        parts[0].merge(other)
    return parts[0].sums()


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 7, 64, 200])
def test_a_sum_is_rounded_once(size: int, devices: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(200, 3).double() * torch.tensor([1e-8, 1, 1e8]).double() + torch.tensor([0, 1e6, 3e9]).double()
    exact = [float(sum(Fraction(value) for value in column)) for column in rows.T.tolist()]
    assert summed(rows, size, devices).tolist() == exact


def test_the_spread_of_large_numbers_is_that_of_their_differences() -> None:
    torch.manual_seed(0)
    differences = torch.randn(100, 1).double()
    values = differences + 1e8
    sums = ExactSums(2)
    squares, rest = product(values, values)
    for rows, lacking in zip(torch.cat((values, squares), 1).split(7), rest.split(7), strict=True):
        sums.add(rows, torch.cat((torch.zeros_like(lacking), lacking), 1))
    found = squared_deviations(sums, slice(0, 1), slice(1, 2), torch.tensor([100.0]).double())
    expected = (values - values.mean()).square().sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-9)


def test_numbers_that_are_not_finite_stay_so() -> None:
    rows = torch.tensor([[1.0, float("inf"), float("nan")], [1.0, 1.0, 1.0]]).double()
    assert summed(rows, 1)[:2].tolist() == [2, float("inf")]
    assert bool(summed(rows, 2)[2].isnan())
