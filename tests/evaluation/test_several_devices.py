"""The counts of several devices add up to those of one: each counts its own samples, and they are sent and merged."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from lora_lightning.evaluation.decision import LoaderCounts, Stream
from lora_lightning.evaluation.found import candidates
from lora_lightning.evaluation.reading import Batch, Context, Sources
from lora_lightning.evaluation.report import Report

N = 90


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TARGETS = {
    "classes": (torch.arange(N) % 5, (5,)),
    "two classes, one output": (torch.arange(N) % 2, ()),
    "more classes than a matrix has": (torch.arange(N) * 31 % 3000, (3000,)),
    "labels": ((torch.arange(N)[:, None] + torch.arange(4)) % 3 == 0, (4,)),
    "values": (random(N, seed=3), ()),
    "several values": (random(N, 3, seed=4), (3,)),
    "pixels": (torch.arange(N * 6).view(N, 2, 3) % 4, (4, 2, 3)),
}


def counted(kind: str, first: int, last: int) -> LoaderCounts:
    """What a device counts of its samples, in batches of seven."""
    targets, shape = TARGETS[kind]
    adapted, base = random(N, *shape, seed=1), random(N, *shape, seed=2)
    counts = LoaderCounts()
    for places in torch.arange(first, last).split(7):
        seen = Batch(targets[places], targets[places])
        sources = Sources(adapted[places], indices=places.tolist())
        counts.update(candidates(adapted[places]), seen, candidates(base[places]), sources)
    counts.to_cpu()
    received: LoaderCounts = pickle.loads(pickle.dumps(counts))
    return received


def reported(counts: LoaderCounts) -> Report:
    chosen = counts.decide()
    assert isinstance(chosen, Stream), chosen
    names = tuple(map(str, range(chosen.tally.number_of_names)))
    return chosen.tally.report(Context("test", names))


@pytest.mark.parametrize("kind", TARGETS)
def test_the_counts_of_several_devices_add_up_to_those_of_one(kind: str) -> None:
    together = counted(kind, 0, 25)
    for first, last in ((25, 25), (25, 60), (60, N)):  # the second device has no samples
        together.merge(counted(kind, first, last))
    one, several = reported(counted(kind, 0, N)), reported(together)
    assert several.adapted.total == one.adapted.total > 0
    assert several.adapted.as_dict() == one.adapted.as_dict()
    assert several.base.as_dict() == one.base.as_dict()
    assert (several.fixed, several.broken) == (one.fixed, one.broken)
    assert several.p_value == one.p_value
    assert (several.improved, several.worsened) == (one.improved, one.worsened)
    if one.pairs is not None:
        assert (several.pairs.fixed, several.pairs.broke) == (one.pairs.fixed, one.pairs.broke)
        assert one.pairs.fixed + one.pairs.broke > 0 or kind.startswith("more classes")
        assert {str(each) for each in several.pairs.samples} == {str(each) for each in one.pairs.samples}
