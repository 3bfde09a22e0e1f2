"""The callbacks in the trainer of `pytorch_lightning`.

It has classes of its own under the names of `lightning.pytorch`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins import AsyncCheckpointIO
from pytorch_lightning.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import ConfusionReport, LoRAFinetuning, PredictionWriter
from lora_lightning.callbacks.training_checks import refuse_strategy
from lora_lightning.lora import adapter_state_dict, base_fingerprint, is_adapted
from lora_lightning.peft_format import load_adapter
from tests.helpers import same

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:The number of training batches",
)


def data() -> DataLoader[Any]:
    x = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.argmax(1) % 3), batch_size=8, generator=torch.Generator())


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self(batch[0])

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


class LateModule(Module):
    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def trainer_in(folder: Path, *callbacks: Any, **arguments: Any) -> pl.Trainer:
    arguments = {"max_epochs": 2, "logger": CSVLogger(folder), "log_every_n_steps": 1} | arguments
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", callbacks=list(callbacks), default_root_dir=folder, **quiet, **arguments)


def test_fit_test_and_predict_work_as_in_lightning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = ModelCheckpoint(monitor="val_loss")
    adapters, report = LoRAFinetuning(rank=2), ConfusionReport()
    logger = TensorBoardLogger(tmp_path)
    trainer = trainer_in(tmp_path, adapters, report, PredictionWriter(), best, logger=logger)
    module = Module()
    before = base_fingerprint(module.net)
    trainer.fit(module, data(), data())
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert set(saved) == {f"net.{layer}.lora_weight.default.lora_{factor}" for layer in (0, 3) for factor in "AB"}
    assert base_fingerprint(module.net) == before
    trainer.test(module, data(), ckpt_path="best", verbose=False)
    assert report.report is not None
    assert report.report.base is not None
    assert report.report.adapted.total == report.report.base.total == 24
    trainer.predict(module, data())
    folder = Path(str(trainer.log_dir))
    assert {"adapter", "report.html", "confusion.json", "predictions.csv"} <= {path.name for path in folder.iterdir()}
    assert f"PredictionWriter: {folder}" in capsys.readouterr().out
    other = Module()
    load_adapter(other.net, folder / "adapter")
    assert {f"net.{key}" for key in adapter_state_dict(other.net)} == set(saved)
    assert same({f"net.{key}": value for key, value in adapter_state_dict(other.net).items()}, saved)


@pytest.mark.parametrize("stopped", [{"max_epochs": 2}, {"max_steps": 3, "max_epochs": -1}])
def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(stopped: dict[str, int], tmp_path: Path) -> None:
    whole, module, resumed = Module(), Module(), Module()
    pl.seed_everything(0, verbose=False)
    trainer_in(tmp_path / "whole", LoRAFinetuning(rank=2), max_epochs=4).fit(whole, data(), data())
    pl.seed_everything(0, verbose=False)
    first = trainer_in(tmp_path / "first", LoRAFinetuning(rank=2), **stopped)
    first.fit(module, data(), data())
    path = first.checkpoint_callback.best_model_path
    trainer_in(tmp_path / "rest", LoRAFinetuning(rank=2), max_epochs=4).fit(resumed, data(), data(), ckpt_path=path)
    assert same(adapter_state_dict(resumed), adapter_state_dict(whole))
    assert resumed.trainer.global_step == whole.trainer.global_step == 12


def test_layers_made_in_configure_model_are_adapted(tmp_path: Path) -> None:
    module = LateModule()
    trainer_in(tmp_path, LoRAFinetuning(rank=2)).fit(module, data(), data())
    assert is_adapted(module.net)
    assert all(value.any() for value in adapter_state_dict(module).values())


@pytest.mark.parametrize("averaging", [EMAWeightAveraging, lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1)])
def test_averaged_weights_keep_the_base(averaging: Any, tmp_path: Path) -> None:
    module = Module()
    before = base_fingerprint(module.net)
    trainer_in(tmp_path, LoRAFinetuning(rank=2), averaging(), max_epochs=3).fit(module, data(), data())
    assert base_fingerprint(module.net) == before


def test_a_full_checkpoint_is_read_back_into_the_trained_model_which_is_plain_then(tmp_path: Path) -> None:
    best, module = ModelCheckpoint(monitor="val_loss"), Module()
    trainer = trainer_in(tmp_path, LoRAFinetuning(rank=2, checkpoints="full"), best)
    trainer.fit(module, data(), data())
    assert is_adapted(module.net)
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    module.load_state_dict(saved)
    assert not is_adapted(module.net)
    assert same(dict(module.state_dict()), saved)
    trainer.test(module, data(), verbose=False)
    assert not is_adapted(module.net)


def test_checkpoints_in_the_background_hold_adapters(tmp_path: Path) -> None:
    files = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    trainer_in(tmp_path, LoRAFinetuning(rank=2), files, plugins=[AsyncCheckpointIO()]).fit(Module(), data(), data())
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert "lora_lightning" in saved
    assert len(saved["state_dict"]) == 4


def test_a_command_line_of_its_own_gets_the_callbacks_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return data()

        def val_dataloader(self) -> DataLoader[Any]:
            return data()

    monkeypatch.setattr("sys.argv", ["train"])
    defaults = {"callbacks": [LoRAFinetuning(rank=2)], "accelerator": "cpu", "log_every_n_steps": 1}
    words = ["fit", "--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path}"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    cli = LightningCLI(Module, Data, seed_everything_default=1, trainer_defaults=defaults, args=[*words, *quiet])
    assert is_adapted(cli.model)
    assert list(tmp_path.rglob("adapter_config.json"))


def test_a_strategy_that_replaces_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="FSDPStrategy replaces the parameters"):
        refuse_strategy(FSDPStrategy())
