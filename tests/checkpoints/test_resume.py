"""A resumed run equals the one that was never stopped, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lora_lightning import Classifier, LoRAFinetuning, MNISTDataModule
from lora_lightning.checkpoints import AtomicCheckpointIO, RandomState, ResumableLoader
from lora_lightning.models import OneCycle
from tests.helpers import same

MakeTrainer = Callable[..., Trainer]


class Noisy(nn.Module):
    """A network with every kind of randomness that training has."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Dropout(0.3), nn.BatchNorm1d(16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Stop(Callback):
    """Ends a run after a number of steps, as a kill would, with a checkpoint at that step at the latest."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError


def everything(trainer: Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """Adapters, optimizer, schedulers, metrics: what has to be the same."""
    return {
        "state": {key: value.clone() for key, value in module.state_dict().items()},
        "optimizer": copy.deepcopy([optimizer.state_dict() for optimizer in trainer.optimizers]),
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "steps": trainer.global_step,
        "random": torch.get_rng_state(),
    }


SETTINGS: dict[str, dict[str, Any]] = {
    "replay": {"data": {"focus": [9]}},
    "shuffled, one digit": {"data": {"digits": [9]}},
    "accumulated gradients": {"trainer": {"accumulate_grad_batches": 3}},
    "two batches of each epoch": {"trainer": {"limit_train_batches": 2}},
    "validated in the middle": {"trainer": {"val_check_interval": 3}},
    "LoRA+ and a scheduler": {"lr_ratio": 8.0, "scheduler": lr_scheduler.StepLR, "scheduler_args": (4,)},
    "one cycle": {"scheduler": lr_scheduler.OneCycleLR, "scheduler_args": (0.02, 1000)},
    "a scheduler that counts the steps of the run": {"scheduler": OneCycle, "scheduler_args": ()},
    "dora, dropout on the adapter": {"lora": {"use_dora": True, "dropout": 0.2}},
    "pissa, a head trained in full": {"lora": {"init": "pissa", "modules_to_save": ["head"]}},
    "ranks from data": {"lora": {"init": "eva"}},
    "averaged weights": {"averaged": True},
}


def cost(setting: str, stop: int) -> list[pytest.MarkDecorator]:
    if stop == 7:
        return [pytest.mark.smoke] if setting == "replay" else []
    return [] if setting == "replay" else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("setting", "stop"),
    [pytest.param(setting, stop, marks=cost(setting, stop)) for setting in SETTINGS for stop in (2, 5, 6, 7, 12)],
)
def test_resumed_run_equals_uninterrupted(setting: str, stop: int, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    settings = SETTINGS[setting]

    def scheduler(optimizer: torch.optim.Optimizer) -> Any:
        return settings["scheduler"](optimizer, *settings["scheduler_args"])

    torch.manual_seed(5)
    lr_ratio = settings.get("lr_ratio", 1.0)
    base = Classifier(Noisy(), lr_scheduler=scheduler if "scheduler" in settings else None, lr_ratio=lr_ratio)

    def run(name: str, *callbacks: Callback, ckpt_path: Path | None = None) -> tuple[Trainer, Classifier]:
        module = copy.deepcopy(base)
        torch.manual_seed(7 if ckpt_path is None else 99)
        data = MNISTDataModule(**{"source": "sample", "batch_size": 150, **settings.get("data", {"digits": [3, 9]})})
        if settings.get("averaged"):
            callbacks = (*callbacks, WeightAveraging())
        files = ModelCheckpoint(tmp_path / name, save_last=True, every_n_train_steps=1, save_top_k=0)
        trainer = make_trainer(
            LoRAFinetuning(**({"rank": 2} | settings.get("lora", {}))),
            files,
            *callbacks,
            max_epochs=3,
            **settings.get("trainer", {}),
        )
        try:
            trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        except InterruptedError:
            assert callbacks
        return trainer, module

    whole = everything(*run("whole"))
    stop = min(stop, whole["steps"] - 1)
    run("stopped", Stop(stop))
    resumed = everything(*run("resumed", ckpt_path=tmp_path / "stopped" / "last.ckpt"))
    assert {key: same(resumed[key], whole[key]) for key in whole} == dict.fromkeys(whole, True)


def test_a_run_that_was_resumed_is_resumed_again_from_every_checkpoint(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning goes on otherwise from the checkpoint of an epoch's last batch than from those of its middle."""
    torch.manual_seed(5)
    base, saved, save = Classifier(Noisy(), lr_scheduler=OneCycle), [], AtomicCheckpointIO.save_checkpoint

    def keep(self: AtomicCheckpointIO, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(self, checkpoint, tmp_path / f"{len(kept)}.ckpt", storage_options)
        saved.append((checkpoint["global_step"], tmp_path / f"{len(kept)}.ckpt"))
        kept.append(path)
        save(self, checkpoint, path, storage_options)

    kept: list[Any] = []
    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", keep)

    def run(ckpt_path: Path | None = None) -> tuple[dict[str, Any], list[tuple[int, Path]]]:
        saved.clear()
        module = copy.deepcopy(base)
        torch.manual_seed(7 if ckpt_path is None else 99)
        files = ModelCheckpoint(tmp_path / str(len(kept)), save_last=True, every_n_train_steps=1)
        trainer = make_trainer(LoRAFinetuning(rank=2, dropout=0.2), files, max_epochs=3)
        data = MNISTDataModule(source="sample", batch_size=240, digits=[3, 9])
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return everything(trainer, module), list(saved)

    whole, of_first = run()
    assert whole["steps"] == 9
    of_an_end = [path for step, path in of_first if step == 3]
    assert len(of_an_end) >= 2
    for first in of_an_end:
        resumed, of_second = run(first)
        assert same(resumed, whole)
        for second in [path for step, path in of_second if step in (4, 6)]:
            again, _ = run(second)
            assert {key: same(again[key], whole[key]) for key in whole} == dict.fromkeys(whole, True)


def test_without_the_callback_for_random_numbers_a_run_does_not_repeat_itself(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Shows that the test above would notice."""

    def run(*callbacks: Callback, seed: int, ckpt_path: Path | None = None) -> dict[str, Any]:
        torch.manual_seed(5)
        module = Classifier(Noisy())
        torch.manual_seed(seed)
        files = ModelCheckpoint(tmp_path / str(seed), filename="{step}", save_top_k=-1, every_n_train_steps=3)
        trainer = make_trainer(files, *callbacks, max_epochs=2)
        trainer.fit(
            module, datamodule=MNISTDataModule(source="sample", batch_size=500, digits=[3, 9]), ckpt_path=ckpt_path
        )
        return everything(trainer, module)

    whole = run(RandomState(), seed=1)
    path = tmp_path / "1" / "step=3.ckpt"
    assert same(run(RandomState(), seed=2, ckpt_path=path)["state"], whole["state"])
    assert not same(run(seed=3, ckpt_path=path)["state"], whole["state"])


def test_a_run_that_max_steps_ended_in_mid_epoch_goes_on_with_a_whole_epoch(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    seen: list[tuple[int, torch.Tensor]] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: pl.LightningModule, batch: Any, *args: Any) -> None:
            seen.append((trainer.current_epoch, batch[0].flatten(1).sum(1)))

    def run(steps: int, ckpt_path: Path | None = None) -> None:
        torch.manual_seed(5)
        files = ModelCheckpoint(tmp_path / str(steps), filename="end")
        trainer = make_trainer(LoRAFinetuning(rank=2), Look(), files, max_steps=steps)
        data = MNISTDataModule(source="sample", batch_size=450)
        trainer.fit(Classifier(Noisy()), datamodule=data, ckpt_path=ckpt_path)

    run(14)
    whole = {epoch: torch.cat([sums for number, sums in seen if number == epoch]) for epoch in (0, 1)}
    seen.clear()
    run(2)
    seen.clear()
    run(10, tmp_path / "2" / "end.ckpt")
    assert [epoch for epoch, _ in seen] == [1] * 6 + [2] * 2
    assert torch.equal(torch.cat([sums for epoch, sums in seen if epoch == 1]), whole[1])
    assert not torch.equal(whole[0], whole[1])


def test_a_loader_of_an_empty_sampler_is_empty() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(3))
    nothing = torch.utils.data.SubsetRandomSampler([])
    assert list(ResumableLoader(data, sampler=nothing, batch_size=2)) == []
    assert [len(batch[0]) for batch in ResumableLoader(data, batch_size=2)] == [2, 1]


def test_overfit_batches_trains_on_the_same_batches_in_every_epoch(make_trainer: MakeTrainer) -> None:
    seen: list[torch.Tensor] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: pl.LightningModule, batch: Any, *args: Any) -> None:
            seen.append(batch[0].clone())

    data = MNISTDataModule(source="sample", batch_size=50, focus=[9])
    trainer = make_trainer(LoRAFinetuning(rank=2), Look(), max_epochs=3, overfit_batches=2)
    with pytest.warns(UserWarning, match="You requested to overfit but enabled train dataloader shuffling"):
        trainer.fit(Classifier(Noisy()), datamodule=data)
    assert trainer.global_step == 6
    assert torch.equal(torch.cat(seen[:2]), torch.cat(seen[2:4]))
    assert torch.equal(torch.cat(seen[:2]), torch.cat(seen[4:]))
    assert not torch.equal(seen[0], seen[1])


def test_validation_draws_no_random_number_of_training(make_trainer: MakeTrainer) -> None:
    states = []
    for interval in (1.0, 1, 2):
        torch.manual_seed(5)
        module = Classifier(Noisy())
        data = MNISTDataModule(source="sample", batch_size=500, digits=[3, 9])
        trainer = make_trainer(LoRAFinetuning(rank=2), max_epochs=2, val_check_interval=interval)
        trainer.fit(module, datamodule=data)
        states.append(everything(trainer, module)["state"])
    assert same(states[0], states[1])
    assert same(states[0], states[2])


@pytest.mark.parametrize(("batch_size", "left"), [(300, 9 - 5), (100, 27 - 15), (1500, 2 - 1), (2700, 1)])
def test_a_checkpoint_in_mid_epoch_of_other_batches_goes_on_after_as_many_samples_and_says_so(
    make_trainer: MakeTrainer, tmp_path: Path, batch_size: int, left: int
) -> None:
    def run(batch_size: int, ckpt_path: Path | None = None) -> Trainer:
        files = ModelCheckpoint(tmp_path / str(batch_size), filename="{step}", save_top_k=-1, every_n_train_steps=3)
        torch.manual_seed(5)
        trainer = make_trainer(LoRAFinetuning(rank=2), files, max_epochs=2)
        data = MNISTDataModule(source="sample", batch_size=batch_size)
        trainer.fit(Classifier(Noisy()), datamodule=data, ckpt_path=ckpt_path)
        return trainer

    run(500)
    what = rf"after 3 batches of an epoch with .*'batch_size': 500.*; this run has .*'batch_size': {batch_size}"
    with pytest.warns(UserWarning, match=what):
        trainer = run(batch_size, tmp_path / "500" / "step=3.ckpt")
    assert trainer.global_step == 3 + left + -(-2700 // batch_size)
