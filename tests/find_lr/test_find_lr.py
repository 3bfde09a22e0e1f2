"""`find_learning_rate`: it finds the best rate of a grid, works with any module, and changes nothing."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import Classifier, ConfusionReport, LoRAFinetuning, MNISTDataModule, RichBoyNet, find_learning_rate
from lora_lightning.checkpoints.random_state import random_state
from lora_lightning.find_lr import FoundRate, LearningRateFactor, Trial
from lora_lightning.models import OneCycle
from tests.helpers import same, state

Run = Callable[..., tuple[int, str]]

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Bowl(LightningModule):
    """A loss of (w - 2)² / 2 + 1, which a step of SGD at a rate of 1 minimizes exactly; above 2, steps diverge."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss())

    def loss(self) -> Tensor:
        return ((self.weight - 2) ** 2).sum() / 2 + 1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.zeros(4, 1)))

    def val_dataloader(self) -> DataLoader[Any]:
        return self.train_dataloader()


def trainer_of(*callbacks: Callback, **options: Any) -> Trainer:
    defaults = {"max_steps": 20, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        accelerator="cpu", devices=1, enable_model_summary=False, callbacks=list(callbacks), **defaults | options
    )


def test_the_best_rate_of_a_known_problem_is_found() -> None:
    found = find_learning_rate(trainer_of(), Bowl(), steps=3)
    assert (found.best.factor, found.best.rate, found.best.loss) == (10, pytest.approx(1), 1)
    assert (found.steps, found.length, found.monitor) == (3, 20, "val_loss")
    assert [trial.factor for trial in found.trials] == [1, 3, 10, 30]
    assert found.trials[1].loss == pytest.approx(1 + 6 * 0.7**6)
    assert found.margin == pytest.approx(6 * 0.7**6, rel=1e-5)
    assert found.warnings == ()
    assert (found.factor, found.rate) == (3, pytest.approx(0.3))  # since in 20 steps, 10 may diverge
    assert found.answer() == (
        "Learning rate 0.3, 3 x the configured one: the next below 1, which has the lowest val_loss, by 70.6% of it, "
        "after 3 steps.\nA rate that is the best in short runs can diverge in a long one."
    )
    assert found.trials[0].curve[0] == found.trials[3].curve[0] == 7
    assert len(found.figure().axes) == 2
    assert found.table().row_count == 4


def test_runs_of_half_the_length_of_fit_are_believed() -> None:
    found = find_learning_rate(trainer_of(max_steps=6), Bowl(), steps=3)
    assert found.factor == found.best.factor == 10
    assert found.answer() == "Learning rate 1, 10 x the configured one: lowest val_loss, by 70.6% of it."


@pytest.mark.parametrize(
    ("rates", "losses", "answer"),
    [
        ((1, 3, 10, 30), (4.0, 3.0, 2.0, 1.0), 10),  # Banking77: 30 has the lowest loss, and diverges in a whole run
        ((1, 1.5, 2, 3), (4.0, 3.0, 2.0, 1.0), 1),  # 2 and 1.5 are hardly lower
        ((1, 3, 10, 30), (1.0, 2.0, 3.0, inf), 1),
        ((1, 3, 10, 30), (inf, inf, 1.0, 2.0), 10),  # nothing lower is finite
    ],
)
def test_the_answer_of_short_runs_keeps_away_from_the_edge(
    rates: tuple[float, ...], losses: tuple[float, ...], answer: float
) -> None:
    trials = tuple(Trial(rate, rate, loss, (), 0.1) for rate, loss in zip(rates, losses, strict=True))
    assert FoundRate(trials, 50, "val_loss", 500).factor == answer


def test_an_answer_at_the_edge_of_the_grid_is_a_warning() -> None:
    highest = find_learning_rate(trainer_of(), Bowl(), rates=[3, 1], steps=2)
    assert highest.best.factor == 3
    assert "a higher one may be better" in highest.warnings[0]
    lowest = find_learning_rate(trainer_of(), Bowl(), rates=[15, 19], steps=2)
    assert lowest.factor == 15
    assert "a lower one may be better" in lowest.warnings[0]


def test_rates_that_are_not_told_apart_are_named() -> None:
    found = find_learning_rate(trainer_of(), Bowl(), rates=[1, 9.9, 10, 30], steps=2)
    assert (found.factor, found.best.factor) == (1, 10)
    assert found.warnings == ("Not told apart from 1 (loss within 2%): 0.99.",)


def test_diverged_rates_are_not_an_answer() -> None:
    found = find_learning_rate(trainer_of(max_steps=400), Bowl(), rates=[1, 1e30], steps=5)
    assert (found.factor, found.margin) == (1, inf)
    assert found.trials[1].diverged
    assert "the only rate that did not diverge" in found.answer()
    nothing = find_learning_rate(trainer := trainer_of(), Bowl(), rates=[1e30], steps=5, apply=True)
    assert nothing.warnings == ("Every rate diverged: try lower ones.",)
    assert nothing.answer() == "No learning rate was found."
    assert not trainer.callbacks


def test_adapters_that_diverge_are_a_result() -> None:
    trainer = trainer_of(LoRAFinetuning(rank=2), max_steps=4)
    model = Classifier(RichBoyNet(), optimizer=sgd)
    found = find_learning_rate(trainer, model, MNISTDataModule(source="sample"), rates=[1, 1e20])
    assert [trial.diverged for trial in found.trials] == [False, True]
    assert found.steps == 4  # fit has no more


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


class TwoOptimizers(Bowl):
    """Steps two optimizers by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Parameter(torch.zeros(2))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss())
            optimizer.step()

    def loss(self) -> Tensor:
        return super().loss() + ((self.second - 2) ** 2).sum() / 2

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([self.weight], lr=0.1), torch.optim.SGD([self.second], lr=0.1)]


class AbsoluteSchedule(Bowl):
    """Has a scheduler whose rates do not depend on those of the optimizer."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=123.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.1, total_steps=10, div_factor=1.0, final_div_factor=1.0, cycle_momentum=False
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Plateau(Bowl):
    """Has a scheduler that needs a validation in each epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=torch.tensor(0.1))
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


class LossOfSteps(Bowl):
    """Logs nothing."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.loss()}


@pytest.mark.parametrize(
    "kind",
    [
        TwoOptimizers,
        LossOfSteps,
        pytest.param(AbsoluteSchedule, marks=pytest.mark.slow),
        pytest.param(Plateau, marks=pytest.mark.slow),
    ],
)
def test_any_module_is_swept(kind: type[Bowl]) -> None:
    model = kind()
    before = state(model)
    every = 1 if kind is Plateau else 2
    found = find_learning_rate(trainer_of(check_val_every_n_epoch=every), model, steps=6)
    assert found.best.factor == 10
    assert found.best.rate == pytest.approx(1)
    assert found.best.loss == 1
    assert found.monitor == ("validation loss" if kind is LossOfSteps else "val_loss")
    assert same(before, state(model))


def test_a_module_of_pytorch_lightning_is_swept() -> None:
    class Its(pytorch_lightning.LightningModule):
        training_step, validation_step, loss = Bowl.training_step, Bowl.validation_step, Bowl.loss
        train_dataloader, val_dataloader = Bowl.train_dataloader, Bowl.val_dataloader
        configure_optimizers = Bowl.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.lr = nn.Parameter(torch.zeros(3)), 0.1

    trainer = pytorch_lightning.Trainer(accelerator="cpu", max_steps=20, enable_model_summary=False, logger=False)
    found = find_learning_rate(trainer, Its(), steps=3)  # type: ignore[arg-type]
    assert found.best.factor == 10


def everything(trainer: Trainer, model: LightningModule, data: MNISTDataModule) -> dict[str, Any]:
    """Return a copy of all state that a sweep might change."""
    return copy.deepcopy(
        {
            "module": model.state_dict(),
            "grads": [parameter.requires_grad for parameter in model.parameters()],
            "keys": sorted(vars(model)),
            "modes": [module.training for module in model.modules()],
            "random": random_state(),
            "callbacks": [(type(each).__name__, each.state_dict(), sorted(vars(each))) for each in trainer.callbacks],
            "adapted": [each.adapted for each in trainer.callbacks if isinstance(each, LoRAFinetuning)],
            "limits": (trainer.max_steps, trainer.max_epochs, trainer.global_step, trainer.should_stop),
            "data": data.state_dict(),
            "source": data.source,
        }
    )


def test_nothing_is_changed_and_fit_goes_as_without_the_sweep(workspace: Path) -> None:
    def parts() -> tuple[Trainer, Classifier, MNISTDataModule]:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 10))
        callbacks = [LoRAFinetuning(rank=2), ConfusionReport(), LearningRateMonitor(), ModelCheckpoint(save_last=True)]
        callbacks += [EarlyStopping("val/loss", patience=0, strict=False)]
        options = {"logger": CSVLogger("logs"), "enable_checkpointing": True, "log_every_n_steps": 1}
        model = Classifier(net, lr_scheduler=OneCycle)
        return trainer_of(*callbacks, max_steps=7, **options), model, MNISTDataModule(source="sample")

    trainer, model, data = parts()
    before = everything(trainer, model, data)
    files = sorted(workspace.rglob("*"))
    found = find_learning_rate(trainer, model, data, steps=3)
    assert same(everything(trainer, model, data), before)
    assert sorted(workspace.rglob("*")) == files
    assert found.monitor == "val/loss"
    again = find_learning_rate(trainer, model, data, steps=3)
    assert [trial.curve for trial in again.trials] == [trial.curve for trial in found.trials]
    trainer.fit(model, datamodule=data)

    plain_trainer, plain, plain_data = parts()
    plain_trainer.fit(plain, datamodule=plain_data)
    assert same(state(model), state(plain))


def test_all_rates_see_the_batches_with_which_fit_begins(workspace: Path) -> None:
    class Seen(Callback):
        batches: list[tuple[int, Tensor]] = []  # noqa: RUF012 - the copies of the callback share it

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            Seen.batches.append((batch_idx, batch[1]))

    trainer, model, data = trainer_of(Seen()), Classifier(RichBoyNet()), MNISTDataModule(source="sample")
    find_learning_rate(trainer, model, data, rates=[1, 3], steps=2)
    trainer.fit_loop.epoch_loop.max_steps = 2
    trainer.fit(model, datamodule=data)
    assert [index for index, _ in Seen.batches] == [0, 1] * 3
    first, second, fit = Seen.batches[:2], Seen.batches[2:4], Seen.batches[4:]
    assert same(first, second)
    assert same(first, fit)


def test_steps_are_a_tenth_of_fit_or_at_least_50() -> None:
    for most, expected in ((40, 40), (400, 50), (1200, 120)):
        assert find_learning_rate(trainer_of(max_steps=most), Bowl(), rates=[1]).steps == expected


def test_the_rates_of_a_trainer_change_only_when_asked() -> None:
    trainer, model = trainer_of(max_steps=1), Bowl()
    find_learning_rate(trainer, model, steps=3)
    assert not trainer.callbacks
    find_learning_rate(trainer, model, steps=3, apply=True)
    [factor] = trainer.callbacks
    assert isinstance(factor, LearningRateFactor)
    trainer.fit(model)
    assert torch.equal(model.weight, torch.full((3,), 2.0))  # reached in one step with the rate 1
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1


def test_what_cannot_be_swept_is_refused_before_it_trains() -> None:
    for options, message in (
        ({"rates": []}, "expected positive factors"),
        ({"rates": [0, 1]}, "expected positive factors"),
        ({"steps": 0}, "expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            find_learning_rate(trainer_of(), Bowl(), **options)
    with pytest.raises(ValueError, match="2 devices"):
        find_learning_rate(Trainer(accelerator="cpu", devices=2, logger=False), Bowl())
    trained = trainer_of()
    trained.fit(model := Bowl())
    with pytest.raises(ValueError, match="has trained for 20 steps"):
        find_learning_rate(trained, model)
    with pytest.raises(ValueError, match="length of fit is not known"):
        find_learning_rate(trainer_of(max_steps=-1, max_epochs=-1), Bowl())
    with pytest.raises(ValueError, match=r"no validation loss.*monitor='loss'; logged metrics: val_loss"):
        find_learning_rate(trainer_of(), Bowl(), monitor="loss")
    with pytest.raises(ValueError, match="there are none"):
        find_learning_rate(trainer_of(limit_val_batches=0), Bowl())
    with pytest.raises(ValueError, match="positive number"):
        LearningRateFactor(0)


def test_an_optimizer_of_the_module_itself_is_refused() -> None:
    model = Bowl()
    before = state(model)
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.1)  # which is not copied
    with pytest.raises(ValueError, match="parameters of the module itself"):
        find_learning_rate(trainer_of(), model)
    assert same(before, state(model))


def test_a_module_that_cannot_be_copied_is_refused_by_name() -> None:
    model = Bowl()
    model.file = Path(__file__).open()  # noqa: SIM115 - closed below
    with model.file, pytest.raises(TypeError, match=r"cannot be copied.*TextIOWrapper"):
        find_learning_rate(trainer_of(), model)


def test_one_rate_is_no_edge() -> None:
    only = FoundRate((Trial(1, 0.1, 2.0, (), 0.1),), 5, "val_loss")
    assert only.warnings == ()
    assert "the only rate of the grid" in only.answer()


def test_the_command_shows_a_table_and_writes_a_figure(run: Run, a_base: Path) -> None:
    words = ("find-lr", "--config", "configs/adapt.yaml", "--data.source", "sample", "--steps", "4")
    logs = sorted(Path("logs").rglob("*"))
    code, output = run(*words, "--rates", "[1,10]")
    assert code == 0, output
    assert "2 learning rates, 4 steps each" in output
    assert "Learning rate 0.03, 10 x the configured one" in output or "Learning rate 0.003, 1 x" in output
    assert "of the grid has the lowest loss" in output
    assert "figure: learning_rates.png" in output
    assert "option: --model.optimizer.lr 0.0" in output
    assert Path("learning_rates.png").stat().st_size > 1000
    assert sorted(Path("logs").rglob("*")) == logs
    code, output = run(*words, "--rates", "[1]", "--output", "learning_rates.png")
    assert code == 1
    assert "not overwritten" in output
    code, output = run(*words, "--adapter", "none")
    assert code == 1
    assert "--adapter none is for commands with --ckpt_path" in output


def test_the_command_goes_on_with_an_adapter_folder(run: Run, a_base_with_adapters: Path) -> None:
    words = ("find-lr", "--config", "configs/adapt.yaml", "--data.source", "sample", "--steps", "2", "--rates", "[1]")
    code, output = run(*words, "--adapter", str(a_base_with_adapters))
    assert code == 0, output
    assert "the only rate of the grid" in output
