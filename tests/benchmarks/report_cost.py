"""What a report costs: a training step with it and without it, and a test pass beside two forward passes, in turns."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet

from lora_lightning import (
    Classifier,
    ComparisonReport,
    ConfusionReport,
    LoRAConfig,
    LoRAFinetuning,
    MNISTDataModule,
    RichBoyNet,
)
from lora_lightning.lora import adapter_parameters, attach, disabled

ROUNDS = 15


class _Epoch(Callback):
    """Takes the time of a training epoch."""

    seconds = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End."""
        self.seconds = time.perf_counter() - self._began


def _milliseconds(*callbacks: Callback) -> float:
    """One epoch of 400 steps of 10 digits each; milliseconds of a step, and whatever the callbacks do in the epoch."""
    seed_everything(0, verbose=False)
    watch = _Epoch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            log_every_n_steps=10,
            logger=TensorBoardLogger(Path(folder), "logs"),
            callbacks=[LoRAFinetuning(rank=1), *callbacks, watch],  # the last one sees the end of the others' hooks
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(Classifier(RichBoyNet()), MNISTDataModule(source="sample", batch_size=10, val_fraction=0))
    return 1000 * watch.seconds / trainer.global_step


class _Tested(LightningModule):
    """Computes the outputs in a test step, and without a report also those of the base."""

    def __init__(self, net: nn.Module, twice: bool) -> None:
        super().__init__()
        self.net, self.twice = net, twice

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])
        if self.twice:
            with disabled(self):
                self(batch[0])


class _Pass(Callback):
    """Takes the CPU time of a test pass, which other processes hardly change."""

    seconds = 0.0

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._began = time.process_time()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End."""
        self.seconds = time.process_time() - self._began


def _small_resnet() -> nn.Module:
    """A ResNet with a block of 16, 32 and 64 channels, for images of 28 x 28."""
    net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10, width_per_group=64)
    net.inplanes = 16
    net.conv1, net.bn1, net.maxpool = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Identity()
    net.layer1, net.layer2 = net._make_layer(BasicBlock, 16, 1), net._make_layer(BasicBlock, 32, 1, stride=2)
    net.layer3, net.layer4 = net._make_layer(BasicBlock, 64, 1, stride=2), nn.Identity()
    net.fc = nn.Linear(64, 10)
    return net


def _adapted(net: nn.Module) -> nn.Module:
    """Attach adapters of rank 8 that do something."""
    attach(net.eval(), LoRAConfig(rank=8, target_modules="all"))
    with torch.no_grad():
        for parameter in adapter_parameters(net):
            parameter += 0.003 * torch.randn_like(parameter)
    return net


def _passes(net: nn.Module, images: Tensor, size: int) -> list[float]:
    """Return the ratios of a test pass with a report to one that computes both outputs, in turns."""
    with torch.no_grad(), disabled(net):
        targets = torch.cat([net(each).argmax(1) for each in images.split(500)])
    targets[::33] = torch.randint(10, targets[::33].shape)  # the base has some 97 % right
    loader, ratios = DataLoader(TensorDataset(images, targets), batch_size=size), []
    for number in range(ROUNDS + 1):
        seconds = {}
        for reports in (True, False) if number % 2 else (False, True):
            watch = _Pass()
            callbacks = [ComparisonReport(verbose=False), watch] if reports else [watch]
            trainer = Trainer(
                accelerator="cpu",
                logger=False,
                callbacks=callbacks,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
            )
            trainer.test(_Tested(net, not reports), loader, verbose=False)
            seconds[reports] = watch.seconds
        ratios.append(seconds[True] / seconds[False])
    return ratios[1:]


def run_pass() -> tuple[Table, Any]:
    """Measure test passes, and return the table and their numbers."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    table = Table("network", "batch", "ratio, quartiles", title="A test pass with a report / the two forward passes")
    found = {}
    for name, make, shape, sizes in (
        ("RichBoyNet, 10,000 digits", RichBoyNet, (10_000, 784), (64, 256, 1000)),
        ("small ResNet, 2,000 images", _small_resnet, (2_000, 1, 28, 28), (64, 256)),
    ):
        torch.manual_seed(0)
        net, images = _adapted(make()), torch.randn(shape)
        for size in sizes:
            ratios = _passes(net, images, size)
            quartiles = statistics.quantiles(ratios, n=4)
            table.add_row(name, f"{size}", f"{quartiles[1]:.3f} ({quartiles[0]:.3f} to {quartiles[2]:.3f})")
            found[f"{name}, {size}"] = ratios
    return table, found


def run() -> tuple[Table, Any]:
    """Measure training steps, and return the table and its numbers."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    _milliseconds(ConfusionReport())  # warm up
    pairs = []
    for number in range(ROUNDS):
        if number % 2:
            with_report, without = _milliseconds(ConfusionReport()), _milliseconds()
        else:
            without, with_report = _milliseconds(), _milliseconds(ConfusionReport())
        pairs.append((with_report, without))
    ratios = [a / b for a, b in pairs]
    table = Table("", "ms a step, median", title="A training epoch of the notebook's protocol, logged every 10 steps")
    table.add_row("with ConfusionReport", f"{statistics.median(a for a, _ in pairs):.3f}")
    table.add_row("without", f"{statistics.median(b for _, b in pairs):.3f}")
    quartiles = statistics.quantiles(ratios, n=4)
    table.add_row("ratio within a turn", f"{quartiles[1]:.3f} ({quartiles[0]:.3f} to {quartiles[2]:.3f})")
    return table, {"with": [a for a, _ in pairs], "without": [b for _, b in pairs], "ratio": quartiles}
