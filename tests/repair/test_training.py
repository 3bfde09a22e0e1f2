"""What the methods of a repair train, and what they leave alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lora_lightning import Classifier, LoRAFinetuning, MNISTDataModule
from lora_lightning.repair.task import Method, Recipe
from lora_lightning.repair.training import Runs


class Normed:
    """A task whose model has a norm layer with statistics."""

    def model(self, method: Method = "adapters") -> Classifier:
        torch.manual_seed(0)
        return Classifier(
            nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
        )

    def adapters(self, rank: int, base: Path) -> LoRAFinetuning:
        return LoRAFinetuning(rank=rank, base_checkpoint=base)


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        ("adapters", set()),
        ("last layer", {"4.weight", "4.bias"}),
        ("full network", {"1.weight", "1.bias", "2.weight", "2.bias", "4.weight", "4.bias"}),
    ],
)
def test_methods_differ_in_what_they_train_alone(method: Method, changed: set[str], tmp_path: Path) -> None:
    task, data = Normed(), MNISTDataModule("sample", batch_size=50)
    base = tmp_path / "base.ckpt"
    torch.save({"state_dict": task.model().state_dict()}, base)
    data.prepare_data()
    data.setup("fit")
    trained = Runs(tmp_path / "logs", "cpu", 1).train("one", task, base, data, method, steps=3, rank=2)
    before, after = (model.backbone.state_dict() for model in (task.model(), trained.model))
    assert {key for key, value in before.items() if not torch.equal(after[key], value)} == changed
    if method != "adapters":
        assert trained.parameters == sum(before[key].numel() for key in changed)


def test_the_base_is_counted_as_frozen_as_below_adapters(tmp_path: Path) -> None:
    """A product with a weight that requires gradients may round differently."""

    class Observed(Normed):
        def model(self, method: Method = "adapters") -> Classifier:
            self.last = super().model(method)
            return self.last

    task, data, base = Observed(), MNISTDataModule("sample"), tmp_path / "base.ckpt"
    torch.save({"state_dict": task.model().state_dict()}, base)
    predictions = Runs(tmp_path / "logs", "cpu", 1).predict_base(task, base, data, "validate")
    assert sum(map(sum, predictions.confusion(MNISTDataModule.class_names).matrix.tolist())) == 300
    assert not any(parameter.requires_grad for parameter in task.last.parameters())


def test_a_base_is_trained_by_its_recipe_with_a_trainer_of_its_own_or_that_of_the_repair(tmp_path: Path) -> None:
    data, runs = MNISTDataModule(source="sample"), Runs(tmp_path / "logs", "cpu", 1)
    model = Normed().model()
    path = runs.train_base(Recipe("one epoch", model, data, max_epochs=1))
    assert path == runs.folder / "base" / "checkpoints" / "base.ckpt"
    torch.testing.assert_close(torch.load(path, weights_only=True)["state_dict"], model.state_dict(), rtol=0, atol=0)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "max_steps": 1}
    own = Trainer(default_root_dir=tmp_path / "own", **options)
    assert runs.train_base(Recipe("one step", Normed().model(), data, trainer=own)).is_relative_to(tmp_path / "own")
    own = Trainer(enable_checkpointing=False, **options)
    with pytest.raises(ValueError, match="has not written a checkpoint"):
        runs.train_base(Recipe("one step", Normed().model(), data, trainer=own))
