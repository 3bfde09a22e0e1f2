"""What is counted follows from all outputs and targets of a run, whatever the size of its batches."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from lora_lightning.evaluation.decision import LoaderCounts, Question, Stream
from lora_lightning.evaluation.found import candidates, find_targets
from lora_lightning.evaluation.reading import Batch, Sources

N, C, L = 24, 5, 7


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(high: int, *shape: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1))


def each_once(classes: int, count: int = N) -> Tensor:
    return torch.arange(count) % classes


def ones_in_rows(count: int, classes: int = C) -> Tensor:
    """Rows with a single 1, but for the last one, which has two: not one-hot."""
    rows = torch.nn.functional.one_hot(each_once(classes, count), classes)
    rows[-1, :2] = 1
    return rows


ONE_HOT = torch.nn.functional.one_hot(each_once(C), C)
AGES = integers(90, N, low=18)
Output = namedtuple("Output", ["features", "logits"])
Target = namedtuple("Target", ["image", "label"])


@dataclass
class Heads:
    features: Tensor
    preds: Tensor


Whole = Callable[[Tensor], Any]
"""Makes the output or the batch of a few samples, given as a tensor of their numbers."""


def rows(tensor: Tensor) -> Whole:
    return lambda places: tensor[places]


def unread(places: Tensor) -> Tensor:
    return torch.zeros(len(places), 3)


def batch_of(targets: Whole) -> Whole:
    return lambda places: (unread(places), targets(places))


def case(output: Tensor | Whole, targets: Tensor | Whole, expected: str | None, **facts: Any) -> Any:
    """One row: what the model returns, what is true, and how it is counted.

    `expected` is the task and its width, `?` if the callback has to ask, or `None` if the task is unknown.
    """
    of_output = rows(output) if isinstance(output, Tensor) else output
    of_batch = batch_of(rows(targets)) if isinstance(targets, Tensor) else targets
    return of_output, of_batch, expected, facts


CASES = {
    "class numbers": case(random(N, C), each_once(C), "classes 5"),
    "class numbers of int32": case(random(N, C), each_once(C).int(), "classes 5"),
    "class numbers of uint8": case(random(N, C), each_once(C).byte(), "classes 5"),
    "class numbers as floats": case(random(N, C), each_once(C).float(), "classes 5"),
    "class numbers in a column": case(random(N, C), each_once(C)[:, None], "classes 5"),
    "logits in half precision": case(random(N, C).bfloat16(), each_once(C), "classes 5"),
    "(B, 1, C) and (B, 1)": case(random(N, 1, C), each_once(C)[:, None], "classes 5"),
    "(B, 1, C) and (B)": case(random(N, 1, C), each_once(C), "classes 5"),
    "(B, C, 1, 1) and (B)": case(random(N, C, 1, 1), each_once(C), "classes 5"),
    "some to ignore": case(random(N, C), each_once(C).masked_fill(torch.arange(N) % 3 == 0, -100), "classes 5"),
    "more classes than occur": case(random(N, 40), each_once(3), "classes 40"),
    "floats that are no classes of the logits": case(random(N, 2), AGES.float(), None),
    "floats between whole numbers": case(random(N, C), random(N), None),
    "one-hot integers": case(random(N, C), ONE_HOT, "classes 5"),
    "one-hot floats": case(random(N, C), ONE_HOT.float(), "classes 5"),
    "one-hot booleans": case(random(N, C), ONE_HOT.bool(), "classes 5"),
    "labels that are one-hot but for a row": case(random(N, C), ones_in_rows(N).float(), "multilabel 5"),
    "labels": case(random(N, C), integers(2, N, C), "multilabel 5"),
    "labels as booleans": case(random(N, C), integers(2, N, C).bool(), "multilabel 5"),
    "labels of probabilities": case(random(N, C).sigmoid(), integers(2, N, C).float(), "multilabel 5"),
    "no label at all, in floats": case(random(N, C), torch.zeros(N, C), "?"),
    "no label at all, in integers": case(random(N, C), torch.zeros(N, C).long(), "multilabel 5"),
    "0 and 1, one output": case(random(N), each_once(2), "classes 2"),
    "0 and 1, a column": case(random(N, 1), each_once(2), "classes 2"),
    "0 and 1 as floats in columns": case(random(N, 1), each_once(2).float()[:, None], "classes 2"),
    "0 and 1 as booleans": case(random(N), each_once(2).bool(), "classes 2"),
    "0 alone, as floats": case(random(N), torch.zeros(N), "?"),
    "0 alone, as integers": case(random(N), torch.zeros(N).long(), "classes 2"),
    "-1 and 1, one output": case(random(N), 2.0 * each_once(2) - 1, "?"),
    "ages as integers": case(random(N), AGES, "regression 1"),
    "ages as floats in columns": case(random(N, 1), AGES.float()[:, None], "regression 1"),
    "ages against a row": case(random(N), AGES.float()[:, None], "regression 1"),
    "a single 7 among 0 and 1": case(random(N), each_once(2).where(torch.arange(N) != 20, 7).float(), "regression 1"),
    "values": case(random(N), random(N, seed=1), "regression 1"),
    "a forecast of seven days": case(random(N, L), random(N, L, seed=1), "regression 7"),
    "images of images": case(random(N, 3, 4, 4), random(N, 3, 4, 4, seed=1), "regression 48"),
    "shares of classes": case(random(N, C), random(N, C).softmax(1), "?"),
    "pixels": case(random(N, C, 6, 4), integers(C, N, 6, 4), "segmentation 5"),
    "pixels with a channel": case(random(N, C, 6, 4), integers(C, N, 1, 6, 4), "segmentation 5"),
    "pixels with the classes last": case(random(N, 6, 4, C), integers(C, N, 6, 4), "segmentation 5"),
    "pixels of images of C by C": case(random(N, C, C, C), integers(C, N, C, C), "segmentation 5"),
    "pixels of two classes": case(random(N, 1, 6, 4), integers(2, N, 6, 4), "segmentation 2"),
    "pixels of two classes in floats": case(random(N, 1, 6, 4), integers(2, N, 1, 6, 4).float(), "segmentation 2"),
    "one-hot pixels": case(
        random(N, C, 6, 4), torch.nn.functional.one_hot(integers(C, N, 6, 4), C).movedim(-1, 1), "segmentation 5"
    ),
    "depths": case(random(N, 1, 6, 4), random(N, 1, 6, 4, seed=1), "regression 24"),
    "tokens": case(random(N, L, C), integers(C, N, L), "tokens 5"),
    "as many tokens as classes": case(random(N, C, C), integers(C, N, C), "?"),
    "as many tokens as classes, of texts": case(random(N, C, C), integers(C, N, C), "tokens 5", is_text=True),
    "following tokens": case(random(N, L, C), integers(C, N, L), "next_tokens 5", is_text=True, is_next_token=True),
    "tokens that are 0 or 1": case(random(N, L), integers(2, N, L), "tokens 2", is_text=True, is_per_token=True),
    "labels of texts": case(random(N, C), integers(2, N, C).float(), "multilabel 5", is_text=True),
    "a named tuple": case(lambda p: Output(random(N, 9)[p], random(N, C)[p]), each_once(C), "classes 5"),
    "an object": case(lambda p: Heads(random(N, 9)[p], random(N, C)[p]), each_once(C), "classes 5"),
    "a tuple with a loss": case(lambda p: (torch.tensor(0.0), random(N, C)[p]), each_once(C), "classes 5"),
    "logits with a loss of each sample": case(
        lambda p: {"loss": random(N)[p], "logits": random(N, C)[p]}, each_once(C), "classes 5"
    ),
    "an output of the transformers library": case(
        lambda p: SequenceClassifierOutput(loss=torch.tensor(0.0), logits=random(N, C)[p]), each_once(C), "classes 5"
    ),
    "pixels with 255 to ignore": case(
        random(N, C, 6, 4),
        integers(C, N, 6, 4).where(integers(3, N, 6, 4) > 0, 255).byte(),
        "segmentation 5",
        ignore_index=255,
    ),
    "probabilities of a single class in columns": case(
        random(N, 1).sigmoid(), each_once(2).float()[:, None], "classes 2"
    ),
    "more classes than a matrix has room for": case(random(N, 3000), each_once(3000), "classes 3000"),
    "a loss and an object": case(
        lambda p: (torch.tensor(0.0), SimpleNamespace(logits=random(N, C)[p])), each_once(C), "classes 5"
    ),
    "a tuple of two that fit": case(lambda p: (random(N, 9)[p], random(N, C)[p]), each_once(C), "?"),
    "targets in a named tuple": case(random(N, C), lambda p: Target(random(N, 3)[p], each_once(C)[p]), "classes 5"),
    "targets in an object": case(
        random(N, C), lambda p: SimpleNamespace(x=random(N, 3)[p], y=each_once(C)[p]), "classes 5"
    ),
    "targets in a dictionary of dictionaries": case(
        random(N, C), lambda p: {"x": random(N, 3)[p], "targets": {"labels": each_once(C)[p]}}, "classes 5"
    ),
    "a model that squeezes its output": case(lambda p: random(N, 1)[p].squeeze(), each_once(2), "classes 2"),
    "a model that squeezes its logits": case(lambda p: random(N, C)[p].squeeze(), each_once(C), "classes 5"),
    "texts of other lengths in each batch": case(
        lambda p: random(N, L, C)[p, : int(p[0]) % 3 + 2],
        batch_of(lambda p: integers(C, N, L)[p, : int(p[0]) % 3 + 2]),
        "tokens 5",
    ),
    "complex targets": case(random(N, C), torch.complex(random(N), random(N)), None),
    "another number of samples": case(random(N, C), batch_of(lambda p: torch.cat((p, p)) % C), None),
}


def decided(name: str, size: int, task: str | None = None) -> str | None:
    output, batch, _, facts = CASES[name]
    counts = LoaderCounts(task)
    for places in torch.arange(N).split(size):
        targets = find_targets(batch(places))
        assert targets is not None
        seen = Batch(targets, targets, **facts)
        counts.update(candidates(output(places)), seen, candidates(output(places)), Sources())
    chosen = counts.decide()
    if isinstance(chosen, Stream):
        width = chosen.width if chosen.reading.task == "regression" else chosen.tally.number_of_names
        return f"{chosen.reading.task} {width}"
    return "?" if isinstance(chosen, Question) else None


@pytest.mark.parametrize("name", CASES)
def test_the_decision_is_right_and_the_same_for_all_batch_sizes(name: str) -> None:
    assert [decided(name, size) for size in (1, 2, 8, N)] == [CASES[name][2]] * 4


@pytest.mark.parametrize(
    ("name", "task", "expected"),
    [
        ("as many tokens as classes", "tokens", "tokens 5"),
        ("as many tokens as classes", "segmentation", "segmentation 5"),
        ("as many tokens as classes", "next_tokens", "next_tokens 5"),
        ("one-hot floats", "multilabel", "multilabel 5"),
        ("0 and 1, one output", "regression", "regression 1"),
        ("0 alone, as floats", "classes", "classes 2"),
        ("-1 and 1, one output", "regression", "regression 1"),
        ("shares of classes", "regression", "regression 5"),
        ("values", "classes", None),
    ],
)
def test_a_task_that_is_named_needs_no_decision(name: str, task: str, expected: str | None) -> None:
    assert [decided(name, size, task) for size in (1, 2, 8, N)] == [expected] * 4


def test_of_several_outputs_the_one_with_the_known_number_of_classes_is_right() -> None:
    output, batch, _, _ = CASES["a tuple of two that fit"]
    counts, places = LoaderCounts(), torch.arange(N)
    targets = batch(places)[1]
    counts.update(candidates(output(places)), Batch(targets, targets), None, Sources())
    chosen = counts.decide(num_classes=C)
    assert isinstance(chosen, Stream)
    assert chosen.place == "[1]"
    question = counts.decide()
    assert isinstance(question, Question)
    assert question.text == "outputs that fit the targets are at [0], [1]: set output_key to one of them"


def test_what_is_counted_is_said_in_one_line() -> None:
    counts = LoaderCounts()
    targets = integers(C, 8, L)
    counts.update(candidates(random(8, L, C)), Batch(targets, targets), None, Sources())
    chosen = counts.decide()
    assert isinstance(chosen, Stream)
    words = chosen.reading.words(chosen.width, chosen.evidence)
    assert words == "classes of tokens: 5, from logits (B, 7, 5) and integer targets (B, 7)"
