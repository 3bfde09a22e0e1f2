"""VGG-19: what its adapters cost in memory and time, against full fine-tuning, and what the frozen prefix saves.

Each contender of `memory` trains in a process of its own, whose largest resident size is taken; those of `prefix` are whole runs
of one process in turns, of which the epochs after the first are timed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.table import Table

from lora_lightning import Classifier, FeatureCache, ImageFolderDataModule, LoRAConfig, LoRAFinetuning, image_backbone
from lora_lightning.lora import adapter_state_dict, attach

LAST_TWO = ["classifier.3", "classifier.6"]
CONTENDERS: dict[str, LoRAConfig | None] = {
    "full fine-tuning": None,
    "adapters in all layers, rank 4": LoRAConfig(rank=4),
    "adapters in the linear layers, rank 4": LoRAConfig(rank=4, target_modules=["classifier.0", *LAST_TWO]),
    "adapters in the last two, rank 4": LoRAConfig(rank=4, target_modules=LAST_TWO),
    "bypass, rank 10": LoRAConfig(rank=10, target_modules=[], bypass=(150_528, 1_000)),
}
BATCH, STEPS, ROUNDS, EPOCHS = 5, 4, 2, 6
MEGABYTE = 1e6


def peak_resident() -> float:
    """This process's largest resident size, in megabytes.

    Not by `getrusage`, which on Linux begins with the size of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    kibibytes = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return kibibytes * 1024 / MEGABYTE


def train(name: str) -> dict[str, float]:
    """A few steps with Adam: the process's largest resident size in megabytes, and seconds a step."""
    torch.manual_seed(0)
    net = torchvision.models.vgg19()
    config = CONTENDERS[name]
    if config is not None:
        attach(net, config)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3, fused=True)
    images, targets = torch.randn(BATCH, 3, 224, 224), torch.ones(BATCH, dtype=torch.long)
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images), targets).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    parameters = sum(parameter.numel() for parameter in trained)
    return {"peak": peak_resident(), "seconds": statistics.median(seconds[1:]), "trained": parameters}


def run_memory() -> tuple[Table, Any]:
    """All contenders in turns, the least of two rounds each."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(ROUNDS):
        for name, outcomes in found.items():
            words = [sys.executable, "-m", "tests.benchmarks.vgg19", name]
            outcomes.append(json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout))
    least = {name: {key: min(each[key] for each in of) for key in of[0]} for name, of in found.items()}
    full = least["full fine-tuning"]
    table = Table(title=f"VGG-19, batch of {BATCH}, Adam", title_justify="left")
    for column in ("", "trained", "peak, MB", "less by, MB", "weight gradients and moments saved, MB", "s / step"):
        table.add_column(column, justify="right" if column else "left")
    for name, outcome in least.items():
        owed = 3 * 4 * (full["trained"] - outcome["trained"]) / MEGABYTE
        outcome |= {"less": full["peak"] - outcome["peak"], "owed": owed}
        numbers = (f"{outcome[key]:,.0f}" for key in ("trained", "peak", "less", "owed"))
        table.add_row(name, *numbers, f"{outcome['seconds']:.2f}")
    return table, least


class Epochs(Callback):
    """Seconds of each training epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the watch."""
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops it."""
        self.seconds.append(time.perf_counter() - self._began)


def fit(cached: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Adapters in the last two linear layers, on the five goldfish."""
    seed_everything(0, verbose=False)
    model = Classifier(image_backbone("vgg19"), num_classes=1000)
    data = ImageFolderDataModule("sample", classes="VGG19_Weights.IMAGENET1K_V1", batch_size=BATCH, in_memory=True)
    epochs = Epochs()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            callbacks=[LoRAFinetuning(rank=4, target_modules=LAST_TWO), epochs, *([FeatureCache()] if cached else [])],
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            limit_val_batches=0,
            logger=False,
            max_epochs=EPOCHS,
        )
        trainer.fit(model, datamodule=data)
    return epochs.seconds, {key: value.clone() for key, value in adapter_state_dict(model).items()}


def run_prefix() -> tuple[Table, Any]:
    """Both in turns; the medians of the epochs after the first."""
    found: dict[str, list[list[float]]] = {"without": [], "with": []}
    states = []
    for _ in range(ROUNDS):
        for name, seconds in found.items():
            epochs, state = fit(name == "with")
            seconds.append(epochs)
            states.append(state)
    same = all(torch.equal(states[0][key], state[key]) for state in states for key in state)
    later = {name: [statistics.median(epochs[1:]) for epochs in of] for name, of in found.items()}
    ratios = [without / cached for without, cached in zip(later["without"], later["with"], strict=True)]
    table = Table(title="Frozen prefix: adapters in VGG-19's last two linear layers, five images", title_justify="left")
    for column in ("cache", "first epoch, ms", "later epochs, ms"):
        table.add_column(column, justify="right" if column != "cache" else "left")
    for name, of in found.items():
        table.add_row(name, f"{1000 * min(each[0] for each in of):,.0f}", f"{1000 * min(later[name]):,.1f}")
    table.caption = (
        f"Faster by {min(ratios):.1f} to {max(ratios):.1f}; adapters bitwise the same: {'yes' if same else 'NO'}"
    )
    return table, {"epochs": found, "ratios": ratios, "same": same}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(train(sys.argv[1])))
