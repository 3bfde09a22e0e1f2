"""Low-rank factorization, and adapters out of a fine-tuned model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig
from lora_lightning.lora import adapter_parameters, extract_adapter, low_rank_factors


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_the_error_of_the_best_approximation_is_what_the_singular_values_leave(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    singular = torch.linalg.svdvals(matrix)
    for rank in range(1, 5):
        a, b = low_rank_factors(matrix, rank)
        assert a.shape == (rank, shape[1])
        assert b.shape == (shape[0], rank)
        torch.testing.assert_close((matrix - b @ a).norm(), singular[rank:].norm(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_out_of_range_is_named(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank={rank}: a matrix of shape \(6, 4\) has a rank of 1 to 4"):
        low_rank_factors(torch.randn(6, 4), rank)


def test_only_a_floating_point_matrix_is_factorised() -> None:
    with pytest.raises(ValueError, match=r"got a tensor of shape \(2, 2\) and torch.int64"):
        low_rank_factors(torch.ones(2, 2, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        low_rank_factors(torch.ones(2), 1)


def test_a_change_of_low_rank_is_extracted_whole() -> None:
    base = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for layer in (tuned[0], tuned[2]):
            rows, columns = layer.weight.shape
            layer.weight += torch.randn(rows, 2).double() @ torch.randn(2, columns).double()
    left_out = extract_adapter(base, tuned, LoRAConfig(rank=2, alpha=7))
    assert left_out == {"0": pytest.approx(0, abs=1e-12), "2": pytest.approx(0, abs=1e-12)}
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(base(x), tuned(x))
    assert all(parameter.requires_grad for parameter in adapter_parameters(base))


def test_what_an_adapter_can_not_say_is_measured_and_named() -> None:
    base = nn.Sequential(nn.Linear(8, 16))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight += torch.eye(16, 8)
        tuned[0].bias += 1
    with pytest.warns(UserWarning, match=r"tensors also differ: \['0.bias'\]"):
        left_out = extract_adapter(base, tuned, LoRAConfig(rank=2))
    assert left_out["0"] == pytest.approx((6 / 8) ** 0.5, rel=1e-5)


def test_two_different_networks_are_refused() -> None:
    base, other = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"they differ in \['0.weight'\]"):
        extract_adapter(base, other, LoRAConfig(rank=1))
