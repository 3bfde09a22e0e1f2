"""torchgeo's tasks as they are: dict batches, steps that return nothing.

The tests need `pip install torchgeo requests`, and run with `pytest -m slow`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lora_lightning import ConfusionReport, LoRAFinetuning
from tests.helpers import same

MakeTrainer = Callable[..., Trainer]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


class Rasters(Dataset[Any]):
    """Twelve made-up rasters."""

    classes = ("water", "forest", "town")

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(3, 64, 64, generator=generator)
        if self.kind == "label":
            return {"image": image, "label": torch.tensor(index % 3)}
        return {"image": image, "mask": torch.randint(0, 3, (64, 64), generator=generator)}


class Data(LightningDataModule):
    def __init__(self, kind: str = "label") -> None:
        super().__init__()
        self.kind = kind

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Rasters(self.kind), batch_size=4)

    val_dataloader = test_dataloader = train_dataloader


def task(kind: str) -> Any:
    trainers = pytest.importorskip("torchgeo.trainers")
    seed_everything(0, verbose=False)
    options = {"weights": None, "in_channels": 3, "task": "multiclass", "num_classes": 3}
    if kind == "label":
        return trainers.ClassificationTask(model="resnet18", **options)
    return trainers.SemanticSegmentationTask(model="unet", backbone="resnet18", ignore_index=0, **options)


@pytest.mark.parametrize("kind", ["label", "mask"])
def test_is_trained_tested_and_resumed_as_it_is(kind: str, make_trainer: MakeTrainer) -> None:
    def run(epochs: int, ckpt_path: Any = None) -> tuple[Any, Trainer, ConfusionReport]:
        module, report = task(kind), ConfusionReport(verbose=False)
        trainer = make_trainer(LoRAFinetuning(rank=2), report, max_epochs=epochs)
        trainer.fit(module, datamodule=Data(kind), ckpt_path=ckpt_path)
        return module, trainer, report

    module, trainer, report = run(2)
    trainer.test(module, datamodule=Data(kind), verbose=False)
    assert report.report.adapted.class_names == Rasters.classes
    masks = torch.stack([Rasters(kind)[index].get(kind) for index in range(12)])
    assert report.report.adapted.total == report.report.base.total == int((masks > 0).sum() if kind == "mask" else 12)
    alone = ConfusionReport(verbose=False)
    make_trainer(alone).test(task(kind), datamodule=Data(kind), verbose=False)
    assert torch.equal(report.report.base.matrix, alone.report.adapted.matrix)
    _, stopped, _ = run(1)
    resumed, _, _ = run(2, stopped.checkpoint_callback.best_model_path)
    assert same(dict(resumed.state_dict()), dict(module.state_dict()))


def test_through_a_users_own_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainers = pytest.importorskip("torchgeo.trainers")
    monkeypatch.chdir(tmp_path)
    words = (
        "--model.model=resnet18 --model.weights=null --model.in_channels=3 "
        "--model.task=multiclass --model.num_classes=3"
    )
    options = "--trainer.max_epochs=1 --trainer.accelerator=cpu --trainer.enable_progress_bar=false"
    callbacks = (
        "--trainer.callbacks+=lora_lightning.LoRAFinetuning --trainer.callbacks.rank=2 "
        "--trainer.callbacks+=lora_lightning.ConfusionReport"
    )
    LightningCLI(trainers.ClassificationTask, Data, args=["fit", *f"{words} {options} {callbacks}".split()])
    assert list(tmp_path.rglob("adapter_model.safetensors"))
