"""The metrics of a run in `metrics.csv`."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import ConfusionReport


class Logging(LightningModule):
    """Logs a loss in each step, another metric in every third one, and a loss in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        if batch_idx % 3 == 0:
            self.log("rare", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_a_metric_has_a_value_at_the_steps_that_measured_it_alone(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    loader = DataLoader(TensorDataset(torch.randn(40, 4), torch.arange(40) % 3), batch_size=4)
    make_trainer(ConfusionReport(verbose=False), max_epochs=2, val_check_interval=5).fit(Logging(), loader, loader)
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    steps = {name: [int(row["step"]) for row in rows if row[name]] for name in rows[0]}
    assert steps["train_loss"] == steps["lr"] == list(range(1, 21))
    assert steps["rare"] == [1, 4, 7, 10, 11, 14, 17, 20]
    # The rate is 0, so that each validation gives the same value, and each is measured.
    assert steps["val_loss"] == steps["val/recall/0"] == [5, 10, 15, 20]
