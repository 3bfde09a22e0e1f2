"""Samples that a model and its base answer differently: counts, McNemar's test, and what is shown of them."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from lora_lightning.evaluation.changes import KEPT, Changes, Inputs, Pairs, Predictions, Shown, small_image
from lora_lightning.evaluation.paired import mcnemar_p

TARGETS = torch.tensor([0, 1, 1, 0, 1])
BASE = torch.tensor([[3.0, 0], [3, 0], [0, 3], [0, 3], [3, 0]])  # right, wrong, right, wrong, wrong
MODEL = torch.tensor([[3.0, 0], [0, 2], [3, 0], [3, 0], [3, 0]])  # right, fixed, broke, fixed, wrong


def changes(batch: Any = None, decode: Any = None) -> Pairs:
    found = Changes()
    found.compare(Predictions.of(MODEL), Predictions.of(BASE), TARGETS, Inputs(batch, torch.arange(5), decode))
    return found.pairs()


def test_fixed_and_broken_samples_are_counted_and_described() -> None:
    pairs = changes(torch.rand(5, 1, 4, 4))
    assert (pairs.fixed, pairs.broke) == (2, 1)
    fixed, second, broke = pairs.samples
    assert (fixed.target, fixed.base, fixed.model, fixed.is_fixed) == (1, 0, 1, True)
    assert (second.target, broke.is_fixed) == (0, False)
    assert fixed.confidence == pytest.approx(1 / (1 + math.exp(-2)))
    assert fixed.base_confidence == pytest.approx(1 / (1 + math.exp(-3)))
    assert all(each.image.startswith("data:image/png;base64,") for each in pairs.samples)


def test_samples_are_named_by_their_index_in_the_data_set_if_it_is_known() -> None:
    known, unknown = Changes(), Changes()
    known.compare(
        Predictions.of(MODEL),
        Predictions.of(BASE),
        TARGETS,
        Inputs(None, torch.arange(5), indices=[10, 11, 12, 13, 14]),
    )
    unknown.compare(Predictions.of(MODEL), Predictions.of(BASE), TARGETS, Inputs(None, torch.arange(5)))
    assert (known.pairs().fixed_indices, known.pairs().broken_indices) == ([11, 13], [12])
    assert [each.index for each in known.pairs().samples] == [11, 13, 12]
    assert (unknown.pairs().fixed_indices, unknown.pairs().broken_indices) == ([], [])


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_p_value_is_that_of_the_exact_test(fixed: int, broke: int) -> None:
    n = fixed + broke
    expected = min(1.0, 2 * sum(math.comb(n, k) for k in range(min(fixed, broke) + 1)) / 2**n)
    assert mcnemar_p(fixed, broke) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_p(fixed, broke) == mcnemar_p(broke, fixed)


def test_many_samples_take_no_time() -> None:
    assert mcnemar_p(1_000_000, 1_000_500) == pytest.approx(0.7238, abs=1e-3)
    assert mcnemar_p(100_000, 0) == 0


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_one_output_stands_for_two_classes(kind: str) -> None:
    found = Changes()
    model, base = torch.tensor([0.9, 0.2, 0.4]), torch.tensor([0.1, 0.3, 0.7])
    if kind == "logits":
        model, base = model.logit(), base.logit()
    found.compare(Predictions.of(model), Predictions.of(base), torch.tensor([1, 0, 1]), Inputs(None, torch.arange(3)))
    pairs = found.pairs()
    assert (pairs.fixed, pairs.broke) == (1, 1)
    assert [(each.target, each.base, each.model) for each in pairs.samples] == [(1, 0, 1), (1, 1, 0)]
    assert [each.confidence for each in pairs.samples] == pytest.approx([0.9, 0.6])


def test_parts_of_samples_are_counted_and_get_no_p_value() -> None:
    found = Changes()
    found.compare(Predictions.of(MODEL), Predictions.of(BASE), TARGETS)
    pairs = found.pairs()
    assert (pairs.fixed, pairs.broke, pairs.samples, pairs.p) == (2, 1, [], None)


def test_a_hundred_of_each_kind_are_kept() -> None:
    made = 0

    class Counted(Inputs):
        def of(self, rows: Sequence[int]) -> list[Shown]:
            nonlocal made
            made += len(rows)
            return super().of(rows)

    found = Changes()
    right, wrong, targets = (
        torch.tensor([[0.0, 1]] * 80),
        torch.tensor([[1.0, 0]] * 80),
        torch.ones(80, dtype=torch.int64),
    )
    for _ in range(3):
        found.compare(Predictions.of(right), Predictions.of(wrong), targets, Counted(None, torch.arange(80)))
        found.compare(Predictions.of(wrong[:5]), Predictions.of(right[:5]), targets[:5], Counted(None, torch.arange(5)))
    pairs = found.pairs()
    assert (pairs.fixed, pairs.broke, len(pairs.samples)) == (240, 15, KEPT + 15)
    assert made == KEPT + 15, "no more are made images or texts than are kept"


@pytest.mark.parametrize(
    ("batch", "texts"),
    [
        ((["a", "b", "c", "d", "e"], TARGETS), ["b", "d", "c"]),
        ({"text": ["a", "b", "c", "d", "e"], "label": TARGETS}, ["b", "d", "c"]),
        (({"input_ids": torch.arange(10).view(5, 2)}, TARGETS), ["2 3", "6 7", "4 5"]),
        ({"input_ids": torch.arange(10).view(5, 2), "labels": TARGETS}, ["2 3", "6 7", "4 5"]),
        (torch.rand(5, 7), ["", "", ""]),
        ({"features": torch.rand(5, 7)}, ["", "", ""]),
        (None, ["", "", ""]),
    ],
)
def test_texts_are_found_in_batches_of_any_form(batch: Any, texts: list[str]) -> None:
    def decode(ids: Tensor) -> list[str]:
        return [" ".join(map(str, row)) for row in ids.tolist()]

    assert [each.text for each in changes(batch, decode).samples] == texts


@pytest.mark.parametrize("layout", ["strided", "nested", "sparse"])
def test_signals_are_kept_of_inputs_of_any_layout(layout: str) -> None:
    rows = torch.rand(5, 30)
    batch = {
        "strided": rows,
        "nested": torch.nested.nested_tensor(list(rows), layout=torch.jagged),
        "sparse": rows.to_sparse(),
    }[layout]
    assert [each.signal for each in changes(batch).samples] == [row.tolist() for row in rows[[1, 3, 2]]]


@pytest.mark.parametrize("shape", [(28, 28), (1, 28, 28), (3, 300, 200), (13, 64, 64), (2, 20, 20)])
def test_images_of_any_size_and_number_of_channels_become_small(shape: tuple[int, ...]) -> None:
    content = small_image(torch.randn(shape))
    image = Image.open(io.BytesIO(base64.b64decode(content.partition(",")[2])))
    assert max(image.size) <= 96
    assert image.size[0] / image.size[1] == pytest.approx(shape[-1] / shape[-2], rel=0.05)
    assert len(content) < 12_000
