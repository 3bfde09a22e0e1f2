"""Orders: functions of (seed, epoch), exact on any number of devices."""

from __future__ import annotations

import pytest
import torch

from lora_lightning.data import ReplaySampler, ShuffledSampler
from lora_lightning.data.in_memory import InMemoryDataset, stratified_split


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own() -> None:
    sampler = ShuffledSampler(50, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(50))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert first != list(ShuffledSampler(50, seed=4))


@pytest.mark.parametrize("devices", [2, 3])
def test_devices_share_an_epoch_and_their_batches_make_up_the_global_one(devices: int) -> None:
    size, batch = 36, 4
    alone = list(ShuffledSampler(size, seed=0))
    parts = [list(ShuffledSampler(size, seed=0, num_replicas=devices, rank=rank)) for rank in range(devices)]
    for start in range(0, size // devices, batch):
        together = {index for part in parts for index in part[start : start + batch]}
        assert together == set(alone[start * devices : (start + batch) * devices])


def test_devices_take_the_same_number_of_steps_of_a_size_that_does_not_divide() -> None:
    parts = [list(ShuffledSampler(10, seed=0, num_replicas=3, rank=rank)) for rank in range(3)]
    assert [len(part) for part in parts] == [4, 4, 4]
    assert {index for part in parts for index in part} == set(range(10))


def test_each_batch_has_its_share_of_focus_samples_and_others_come_once() -> None:
    is_focus = torch.arange(200) < 20
    sampler = ReplaySampler(is_focus, batch_size=10, focus_fraction=0.35, seed=0)
    order = torch.tensor(list(sampler)).view(-1, 10)
    assert len(sampler) == order.numel()
    assert (is_focus[order].sum(1) == 4).all()  # 3.5 rounds to the even 4
    others = order[~is_focus[order]]
    assert len(others) == 180
    assert len(others.unique()) == 180
    assert set(order[is_focus[order]].tolist()) == set(range(20))
    sampler.set_epoch(1)
    assert list(sampler) != order.flatten().tolist()


def test_every_device_gets_the_share() -> None:
    is_focus = torch.arange(200) < 20
    seen: list[int] = []
    for rank in range(2):
        sampler = ReplaySampler(is_focus, batch_size=10, focus_fraction=0.5, seed=0, num_replicas=2, rank=rank)
        order = torch.tensor(list(sampler)).view(-1, 10)
        assert (is_focus[order].sum(1) == 5).all()
        seen += order[~is_focus[order]].tolist()
    assert len(seen) == len(set(seen)) == 180


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"focus_fraction": 1.0}, "focus_fraction=1.0: expected a share above 0 and below 1"),
        ({"batch_size": 1}, "batch_size=1: a batch needs at least 2 samples"),
        (
            {"is_focus": torch.zeros(9, dtype=torch.bool)},
            "0 focus and 9 other samples are not enough for one batch of 2 . 2",
        ),
        ({"is_focus": torch.ones(9, dtype=torch.bool)}, "9 focus and 0 other samples"),
    ],
)
def test_what_can_not_be_mixed_is_named(arguments: dict[str, object], message: str) -> None:
    settings = {"is_focus": torch.arange(9) < 3, "batch_size": 4, "focus_fraction": 0.5, "seed": 0} | arguments
    with pytest.raises(ValueError, match=message):
        ReplaySampler(**settings)


def test_a_split_keeps_every_classs_share_and_follows_its_seed() -> None:
    targets = torch.tensor([0] * 100 + [1] * 50 + [2] * 10)
    kept, held = stratified_split(targets, 32, seed=0)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(160))
    assert torch.bincount(targets[held]).tolist() == [20, 10, 2]
    assert torch.equal(held, stratified_split(targets, 32, seed=0)[1])
    assert not torch.equal(held, stratified_split(targets, 32, seed=1)[1])
    assert len(stratified_split(targets, 0, seed=0)[1]) == 0


def test_a_batch_is_indexed_at_once_and_equals_its_samples() -> None:
    dataset = InMemoryDataset(torch.arange(12).view(4, 3), torch.arange(4))
    inputs, targets = dataset.__getitems__([2, 0])
    assert torch.equal(inputs, torch.stack([dataset[2][0], dataset[0][0]]))
    assert targets.tolist() == [2, 0]
    with pytest.raises(ValueError, match="4 inputs for 3 targets"):
        InMemoryDataset(torch.zeros(4), torch.zeros(3))


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_batches_with_a_focus_hold_samples_of_similar_length(num_replicas: int) -> None:
    is_focus = torch.arange(4000) % 10 == 0
    lengths = torch.randint(3, 60, (4000,), generator=torch.Generator().manual_seed(0))

    def batches(**settings: object) -> torch.Tensor:
        rows = []
        for rank in range(num_replicas):
            placement = {"seed": 0, "num_replicas": num_replicas, "rank": rank}
            sampler = ReplaySampler(is_focus, batch_size=20, focus_fraction=0.2, **placement, **settings)
            rows.append(torch.tensor(list(sampler)).view(-1, 20))
        return torch.stack(rows, 1).flatten(0, 1)

    mixed, grouped = batches(), batches(lengths=lengths.tolist())
    assert (is_focus[grouped].sum(1) == 4).all()
    others = grouped[~is_focus[grouped]]
    assert sorted(others.tolist()) == sorted(mixed[~is_focus[mixed]].tolist())
    longest = [lengths[each].amax(1).float() for each in (mixed, grouped)]
    assert longest[1].mean() < 0.7 * longest[0].mean()
    steps = longest[1].view(-1, num_replicas)
    assert (steps.amax(1) - steps.amin(1)).float().mean() < 4  # the devices of one step wait little for each other
    assert (steps[1:, 0] > steps[:-1, 0]).float().mean() < 0.7  # and steps come in no order of length
