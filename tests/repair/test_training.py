"""What the methods of a repair train, and what they leave alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lora_lightning import Classifier, LoRAFinetuning, MNISTDataModule
from lora_lightning.repair.task import Way
from lora_lightning.repair.training import Runs


class Normed:
    """A task whose model has a norm layer with statistics."""

    def model(self, way: Way = "adapters") -> Classifier:
        torch.manual_seed(0)
        return Classifier(
            nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
        )

    def adapters(self, rank: int, base: Path) -> LoRAFinetuning:
        return LoRAFinetuning(rank=rank, base_checkpoint=base)


@pytest.mark.parametrize(
    ("way", "changed"),
    [
        ("adapters", set()),
        ("last layer", {"4.weight", "4.bias"}),
        ("full network", {"1.weight", "1.bias", "2.weight", "2.bias", "4.weight", "4.bias"}),
    ],
)
def test_methods_differ_in_what_they_train_alone(way: Way, changed: set[str], tmp_path: Path) -> None:
    task, data = Normed(), MNISTDataModule("sample", batch_size=50)
    base = tmp_path / "base.ckpt"
    torch.save({"state_dict": task.model().state_dict()}, base)
    data.prepare_data()
    data.setup("fit")
    trained = Runs(tmp_path / "logs", "cpu", 1).train("one", task, base, data, way, steps=3, rank=2)
    before, after = (model.backbone.state_dict() for model in (task.model(), trained.model))
    assert {key for key, value in before.items() if not torch.equal(after[key], value)} == changed
    if way != "adapters":
        assert trained.parameters == sum(before[key].numel() for key in changed)


def test_the_base_is_counted_as_frozen_as_below_adapters(tmp_path: Path) -> None:
    """A product with a weight that requires gradients may round differently."""

    class Observed(Normed):
        def model(self, way: Way = "adapters") -> Classifier:
            self.last = super().model(way)
            return self.last

    task, data, base = Observed(), MNISTDataModule("sample"), tmp_path / "base.ckpt"
    torch.save({"state_dict": task.model().state_dict()}, base)
    answers = Runs(tmp_path / "logs", "cpu", 1).base_answers(task, base, data, "validate")
    assert sum(map(sum, answers.confusion([str(digit) for digit in range(10)]).matrix.tolist())) == 400
    assert not any(parameter.requires_grad for parameter in task.last.parameters())
