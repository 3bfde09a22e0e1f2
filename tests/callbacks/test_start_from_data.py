"""Runs whose adapters start from the first batches: `LoRAFinetuning(init="eva")`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lora_lightning import Classifier, LoRAFinetuning, MNISTDataModule, RichBoyNet, lora
from lora_lightning.callbacks import start_from_data
from lora_lightning.lora import adapted_weights, adapter_state_dict
from tests.helpers import same, state

MakeTrainer = Callable[..., Trainer]


def sample(**arguments: Any) -> MNISTDataModule:
    return MNISTDataModule(**({"source": "sample", "batch_size": 100, "digits": [3, 9]} | arguments))


def model() -> Classifier:
    torch.manual_seed(1)
    return Classifier(RichBoyNet(48, 32))


def finetuning(**arguments: Any) -> LoRAFinetuning:
    return LoRAFinetuning(**({"rank": 4, "init": "eva"} | arguments))


def ranks(module: nn.Module) -> dict[str, int]:
    return {weight.name: weight.rank for weight in adapted_weights(module)}


@pytest.fixture
def no_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be computed from batches."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("batches were read")

    monkeypatch.setattr(start_from_data, "eva", refuse)


def test_fit_finds_ranks_trains_them_and_writes_a_folder_of_them(make_trainer: MakeTrainer) -> None:
    callback, module = finetuning(), model()
    trainer = make_trainer(callback, max_epochs=1)
    trainer.fit(module, datamodule=sample())
    assert sum(ranks(module).values()) == 12
    assert len(set(ranks(module).values())) > 1
    assert all(value.any() for value in adapter_state_dict(module).values())
    other = model()
    again = make_trainer(LoRAFinetuning(adapter=callback.adapter_folder))
    assert again.test(other, sample(), verbose=False) == [
        pytest.approx(trainer.test(module, sample(), verbose=False)[0])
    ]
    assert ranks(other) == ranks(module)


class Recorder(Callback):
    """Records what a run trains on, and where its random numbers stand."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.random: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch[0].clone())
        self.random.append(torch.get_rng_state())


class Counting(LightningModule):
    """A module whose steps leave traces: metrics, counters, statistics, logs and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 2))
        self.seen, self.mean = 0, MeanMetric()
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.seen += 1
        self.mean.update(loss.detach())
        self.losses.append(float(loss.detach()))
        self.log("loss", self.mean)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([value for value in self.parameters() if value.requires_grad], lr=0.1)


def shuffled(**arguments: Any) -> DataLoader[Any]:
    torch.manual_seed(3)
    return DataLoader(TensorDataset(torch.randn(64, 8), torch.randint(2, (64,))), 8, shuffle=True, **arguments)


@pytest.mark.parametrize("own_generator", [False, True])
def test_the_run_gets_the_batches_and_random_numbers_that_it_gets_without(
    make_trainer: MakeTrainer, own_generator: bool
) -> None:
    recorded = []
    for init in ("kaiming", "eva"):
        torch.manual_seed(0)
        module, recorder = Counting(), Recorder()
        loader = shuffled(**({"generator": torch.Generator().manual_seed(5)} if own_generator else {}))
        make_trainer(finetuning(rank=2, init=init), recorder, max_epochs=2).fit(module, loader)
        assert module.seen == len(module.losses) == 16
        recorded.append(recorder)
    assert same(recorded[0].batches, recorded[1].batches)
    assert same(recorded[0].random, recorded[1].random)


def test_the_pass_over_batches_changes_nothing(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Counting()
    before, found = state(module), []
    original = start_from_data._eva_of_first_batches

    def look(*arguments: Any) -> Any:
        result = original(*arguments)
        found.append((same(state(module), before), module.seen, module.mean.update_called, module.training))
        return result

    monkeypatch.setattr(start_from_data, "_eva_of_first_batches", look)
    make_trainer(finetuning(rank=2), max_epochs=1).fit(module, shuffled())
    assert found == [(True, 0, False, True)]


def test_test_takes_the_ranks_of_the_checkpoint(
    make_trainer: MakeTrainer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    module, files = model(), ModelCheckpoint(tmp_path / "files")
    trainer = make_trainer(finetuning(), files, max_epochs=1)
    trainer.fit(module, datamodule=sample())
    expected = trainer.test(module, sample(), verbose=False)
    request.getfixturevalue("no_batches")
    other = model()
    found = make_trainer(finetuning()).test(other, sample(), ckpt_path=files.best_model_path, verbose=False)
    assert found == expected
    assert same(adapter_state_dict(other), adapter_state_dict(module))


def test_test_takes_the_ranks_of_the_checkpoint_after_a_validation_without_one(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module, files = model(), ModelCheckpoint(tmp_path / "files")
    make_trainer(finetuning(), files, max_epochs=1).fit(module, datamodule=sample())
    other, callback = model(), finetuning()
    make_trainer(callback).validate(other, sample(), verbose=False)
    make_trainer(callback).test(other, sample(), ckpt_path=files.best_model_path, verbose=False)
    assert same(adapter_state_dict(other), adapter_state_dict(module))


@pytest.mark.parametrize("averaged", [False, True])
def test_a_stopped_run_reads_no_batches_again_and_ends_with_the_same_bits(
    make_trainer: MakeTrainer, tmp_path: Path, request: pytest.FixtureRequest, averaged: bool
) -> None:
    base = model()

    def run(name: str, epochs: int, ckpt_path: Path | None = None) -> Classifier:
        module = copy.deepcopy(base)
        torch.manual_seed(7 if ckpt_path is None else 99)
        files = ModelCheckpoint(tmp_path / name, save_last=True)
        others = [WeightAveraging()] if averaged else []
        trainer = make_trainer(finetuning(), files, *others, max_epochs=epochs)
        trainer.fit(module, datamodule=sample(), ckpt_path=ckpt_path)
        return module

    whole, _ = run("whole", 2), run("stopped", 1)
    request.getfixturevalue("no_batches")
    resumed = run("resumed", 2, tmp_path / "stopped" / "last.ckpt")
    assert same(state(resumed), state(whole))


def test_adapters_of_a_validation_before_fit_are_replaced(make_trainer: MakeTrainer) -> None:
    module, callback = model(), finetuning()
    make_trainer(callback).validate(module, sample(), verbose=False)
    assert set(ranks(module).values()) == {4}
    make_trainer(callback, max_epochs=1).fit(module, datamodule=sample())
    found = ranks(module)
    assert len(set(found.values())) > 1
    make_trainer(callback, max_epochs=1).fit(module, datamodule=sample())  # goes on
    assert ranks(module) == found


def test_a_cell_that_runs_twice_goes_on_with_the_ranks_that_were_found(make_trainer: MakeTrainer) -> None:
    module = model()
    make_trainer(finetuning(), max_epochs=1).fit(module, datamodule=sample())
    found = ranks(module)
    make_trainer(finetuning(), max_epochs=1).fit(module, datamodule=sample())
    assert ranks(module) == found


class Manual(Counting):
    """A module that steps its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Teaching(Counting):
    """A module whose step changes a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Parameter(torch.zeros(2), requires_grad=False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.teacher.add_(1)
        return super().training_step(batch, batch_idx)


class Failing(Counting):
    """A module that needs its optimizer in each step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log("rate", self.optimizers().param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)


def test_modules_that_cannot_be_tried_are_refused_by_name(make_trainer: MakeTrainer) -> None:
    for module, message in ((Manual(), "automatic_optimization=False"), (Teaching(), "changes 'teacher'")):
        with pytest.raises(ValueError, match=message):
            make_trainer(finetuning(rank=2), max_epochs=1).fit(module, shuffled())
    with pytest.raises(Exception, match=r"list index|no attribute") as caught:
        make_trainer(finetuning(rank=2), max_epochs=1).fit(Failing(), shuffled())
    assert "Use another init" in caught.value.__notes__[0]


def test_merge_loads_a_checkpoint_with_its_ranks(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    from lora_lightning.callbacks.merging import load_merged

    module, files = model(), ModelCheckpoint(tmp_path / "files")
    make_trainer(finetuning(), files, max_epochs=1).fit(module, datamodule=sample())
    other = model()
    load_merged(make_trainer(finetuning()), other, files.best_model_path)
    lora.merge(module.backbone)
    assert same(state(other.backbone), state(module.backbone))
