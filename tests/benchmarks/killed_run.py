"""A short training for `kills` to kill and resume: `python -m tests.benchmarks.killed_run SETTING FOLDER [CHECKPOINT]`.

It prints the number of each batch as it starts, and at its end writes what has to be bitwise equal to
`FOLDER/result.pt`.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lora_lightning import LoRAFinetuning

BATCHES, BATCH_SIZE, EPOCHS = 12, 8, 8
RESULT = "result.pt"


@dataclass(frozen=True)
class Setting:
    """Holds what differs between the runs.

    Args:
        trainer: Arguments of `Trainer`.
        files: Arguments of `ModelCheckpoint`.
        one_cycle: Whether the module has a `OneCycleLR` over `trainer.estimated_stepping_batches`.
        averaged: Whether `EMAWeightAveraging` runs.
        workers: Number of the loader's workers.
        augmented: Whether the samples are augmented by torchvision and with NumPy's generator.
        devices: Number of processes.
        new_folder: Whether each resumed run saves its checkpoints elsewhere.
    """

    trainer: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=lambda: {"every_n_train_steps": 4})
    one_cycle: bool = False
    averaged: bool = False
    workers: int = 0
    augmented: bool = False
    devices: int = 1
    new_folder: bool = False


ACCUMULATED = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
SETTINGS = {
    "all at once": Setting(
        {**ACCUMULATED, "val_check_interval": 5},
        {"every_n_train_steps": 3, "save_last": "link"},
        one_cycle=True,
        averaged=True,
        workers=2,
    ),
    "accumulated, clipped": Setting(ACCUMULATED),
    "one cycle, val_check_interval": Setting({"val_check_interval": 5}, {"every_n_train_steps": 1}, one_cycle=True),
    "averaged, two workers, linked": Setting({}, {"save_last": "link"}, averaged=True, workers=2),
    "plain shuffled loader": Setting(files={}),
    "monitor, new folder": Setting(files={"monitor": "loss", "save_last": True}, new_folder=True),
    "images with NumPy's numbers": Setting(augmented=True),
    "two gloo processes": Setting(devices=2),
}


class Noise:
    """Adds noise drawn with NumPy's global generator, as transforms do."""

    def __call__(self, image: Tensor) -> Tensor:
        return image + torch.from_numpy(0.1 * np.random.randn(*image.shape)).float()


class Images(Dataset[tuple[Tensor, int]]):
    """Random images, whose class is the brightest of three rows."""

    def __init__(self, count: int, augmented: bool) -> None:
        self.images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        self.transform: Any = None
        if augmented:
            from torchvision.transforms import v2

            self.transform = v2.Compose([v2.RandomResizedCrop(8), v2.RandomHorizontalFlip(), Noise()])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        target = int(image[0, :3].sum(1).argmax())
        return (self.transform(image) if self.transform else image), target


class Module(LightningModule):
    """A network with dropout."""

    def __init__(self, one_cycle: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.2), nn.ReLU(), nn.Linear(32, 3))
        self.one_cycle = one_cycle

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)
        if not self.one_cycle:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class PrintBatches(Callback):
    """Prints the number of each batch when it starts."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            print(f"batch {trainer.fit_loop.total_batch_idx + 1}", flush=True)


def run(name: str, folder: Path, checkpoint: str | None) -> None:
    """Train, from a checkpoint if there is one, and write the result."""
    setting = SETTINGS[name]
    warnings.filterwarnings("ignore")
    seed_everything(0, verbose=False)
    module = Module(setting.one_cycle)
    finetuning = LoRAFinetuning(rank=2, dropout=0.1)
    files = ModelCheckpoint(folder, **setting.files)
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=setting.devices,
        strategy="ddp" if setting.devices > 1 else "auto",
        logger=False,
        callbacks=[finetuning, files, PrintBatches(), *([EMAWeightAveraging(decay=0.9)] if setting.averaged else [])],
        enable_progress_bar=False,
        enable_model_summary=False,
        **setting.trainer,
    )
    samples = Images(BATCHES * BATCH_SIZE * setting.devices, setting.augmented)
    options: dict[str, Any] = {"num_workers": setting.workers}
    if setting.workers:
        options["multiprocessing_context"] = "fork"
    loaders = DataLoader(samples, BATCH_SIZE, shuffle=True, **options), DataLoader(Images(24, False), 8)
    trainer.fit(module, *loaders, ckpt_path=checkpoint)
    if trainer.is_global_zero:
        score = files.best_model_score if setting.files.get("monitor") else None
        result = {
            "state": dict(module.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
            "adapter folder": load_file(Path(str(finetuning.adapter_folder)) / "adapter_model.safetensors"),
            "best": None if score is None else (Path(files.best_model_path).name, float(score)),
            "random": [torch.get_rng_state(), np.random.get_state()[1].tolist()],
            "progress": (trainer.global_step, trainer.current_epoch),
        }
        torch.save(result, folder / RESULT)


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
