"""Libraries that read a run's best checkpoint back into the trained model, or into a new one.

The callback is still there then.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import LoRAFinetuning, lora
from lora_lightning.lora import is_adapted
from tests.helpers import same, state

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:The number of training batches",
    "ignore:You defined a `validation_step`",
    "ignore:Checkpoint directory .* exists and is not empty",
)


def loader() -> DataLoader[Any]:
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)


class Forecaster(LightningModule):
    """A model with a norm layer and a buffer, whose first epoch has the best score."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 1)
        self.register_buffer("mean", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x)) + self.mean

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("score", float(self.current_epoch))

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=0.05)


class AtBest(Callback):
    """Keeps what the model computes at the end of the best epoch."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0 and not trainer.sanity_checking:
            self.model = copy.deepcopy(pl_module).eval()


def trainer_in(folder: Path, *callbacks: Callback) -> Trainer:
    return Trainer(
        max_epochs=3, accelerator="cpu", logger=False, callbacks=list(callbacks), default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip


def fit(model: LightningModule, folder: Path, **options: Any) -> tuple[Trainer, LoRAFinetuning, AtBest, dict[str, Any]]:
    """Fine-tune a model; return what the library has then, and the state in the best checkpoint."""
    callback, best = LoRAFinetuning(rank=2, **options), ModelCheckpoint(folder, monitor="score")
    at_best = AtBest()
    trainer = trainer_in(folder, callback, best, at_best)
    trainer.fit(model, loader(), loader())
    return trainer, callback, at_best, torch.load(best.best_model_path, weights_only=True)["state_dict"]


class InMemory(Logger):
    """Keeps metrics in memory, and has no folder."""

    name, version = "memory", 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize("with_checkpoints", [True, False])
def test_with_a_logger_that_has_no_folder_the_adapters_lie_beside_the_checkpoints_or_nowhere(
    with_checkpoints: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    callback, files = LoRAFinetuning(rank=2), [ModelCheckpoint(tmp_path / "c")] if with_checkpoints else []
    Trainer(
        max_epochs=1, accelerator="cpu", logger=InMemory(), callbacks=[callback, *files], enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=with_checkpoints,
    ).fit(Forecaster(), loader())  # fmt: skip
    assert callback.adapter_folder == (tmp_path / "c" / "adapter" if with_checkpoints else None)
    assert sorted(tmp_path.rglob("adapter_config.json")) == (
        [tmp_path / "c/adapter/adapter_config.json"] if with_checkpoints else []
    )


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


def test_the_trained_model_takes_the_full_state_of_its_best_epoch_and_is_plain_then(tmp_path: Path) -> None:
    model = Forecaster()
    plain = state(model)
    trainer, _, at_best, saved = fit(model, tmp_path, checkpoints="full", modules_to_save=["head"])
    model.load_state_dict(saved)
    assert not is_adapted(model)
    assert state(model).keys() == plain.keys()
    assert same(state(model), saved)
    torch.testing.assert_close(model.eval()(X), at_best.model(X))
    assert all(parameter.requires_grad for parameter in model.parameters())
    # Nothing of ours is left in it: others unpickle it where this package is not installed.
    assert b"lora_lightning" not in pickle.dumps(model)
    (first, *_) = trainer.predict(model, loader())
    assert torch.equal(first, model(next(iter(loader()))[0]))
    assert not is_adapted(model)


def test_hooks_of_others_stay_when_the_model_becomes_plain(tmp_path: Path) -> None:
    model, called = Forecaster(), []
    model.register_load_state_dict_pre_hook(lambda *_: called.append("before"))
    _, _, _, saved = fit(model, tmp_path, checkpoints="full")
    model.register_load_state_dict_pre_hook(lambda *_: called.append("after"))
    for _ in range(2):
        called.clear()
        model.load_state_dict(saved)
        assert called == ["before", "after"]


def test_the_trained_model_takes_the_adapters_of_its_best_epoch_beside_its_own_base(tmp_path: Path) -> None:
    model = Forecaster()
    base = state(model)
    _, _, at_best, saved = fit(model, tmp_path, modules_to_save=["head"])
    assert not saved.keys() & {"net.0.weight", "net.1.running_mean"}
    model.load_state_dict(saved)
    assert torch.equal(model.eval()(X), at_best.model(X))
    assert all(torch.equal(value, state(model)[key]) for key, value in base.items() if not key.startswith("head"))


@pytest.mark.parametrize("options", [{}, {"checkpoints": "full"}], ids=["adapters", "full"])
def test_a_state_that_lacks_more_than_the_base_is_refused_as_ever(options: dict[str, Any], tmp_path: Path) -> None:
    model = Forecaster()
    _, _, _, saved = fit(model, tmp_path, **options)
    before = state(model)
    del saved[next(iter(saved))]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(saved)
    assert state(model).keys() == before.keys()
    assert is_adapted(model)


def test_during_a_run_the_adapters_stay_since_the_optimizer_has_them(tmp_path: Path) -> None:
    plain = Forecaster().state_dict()

    class Reloads(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.load_state_dict(plain)

    with pytest.raises(RuntimeError, match="Missing key"):
        trainer_in(tmp_path, LoRAFinetuning(rank=2, checkpoints="full"), Reloads()).fit(Forecaster(), loader())


def test_the_hook_leaves_after_the_adapters_and_a_copy_has_its_own(tmp_path: Path) -> None:
    model = Forecaster()
    _, _, _, saved = fit(model, tmp_path, checkpoints="full")
    twin = copy.deepcopy(model)
    lora.merge(model)
    model.load_state_dict(model.state_dict())
    assert not model._load_state_dict_pre_hooks
    assert is_adapted(twin)
    twin.load_state_dict(saved)
    assert same(state(twin), saved)
    assert not twin._load_state_dict_pre_hooks


def test_a_network_among_the_hyper_parameters_is_pickled_without_the_model(tmp_path: Path) -> None:
    sizes = []

    class Pickles(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.cannot_be_pickled = lambda: None
            sizes.append(len(pickle.dumps(pl_module.net)))

    trainer_in(tmp_path, LoRAFinetuning(rank=2), Pickles()).fit(Forecaster(), loader())
    assert sizes


@pytest.mark.parametrize("with_file", [False, True], ids=["base in the model", "base in a file"])
def test_a_plain_model_of_the_best_checkpoint_predicts_with_its_own_weights(with_file: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoints": "full"}
    if with_file:
        torch.save(Forecaster().state_dict(), tmp_path / "base.pt")
        options["base_checkpoint"] = tmp_path / "base.pt"
    trainer, _, _, saved = fit(Forecaster(), tmp_path, **options)
    loaded = Forecaster()
    loaded.load_state_dict(saved)
    expected = loaded.eval()(next(iter(loader()))[0])
    (first, *_) = trainer.predict(loaded, loader())
    assert torch.equal(first, expected)
    assert same(state(loaded), saved)
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    assert same(torch.load(tmp_path / "own.ckpt", weights_only=True)["state_dict"], saved)
