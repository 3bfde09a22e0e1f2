"""The memory of a test pass over a million samples of 1,000 classes, with a report and without it, and its page."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lora_lightning import ComparisonReport, LoRAConfig
from lora_lightning.lora import adapter_parameters, attach


class _Made(Dataset[Any]):
    """Makes the samples of a batch when they are read."""

    def __init__(self, classes: int, samples: int) -> None:
        self._classes, self._samples = classes, samples

    def __len__(self) -> int:
        return self._samples

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(indices[0])
        targets = torch.randint(self._classes, (len(indices),), generator=generator)
        return torch.randn(len(indices), 32, generator=generator), targets


class _Linear(LightningModule):
    """A layer whose adapters do something."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(32, classes)
        attach(self.layer, LoRAConfig(rank=2))
        with torch.no_grad():
            for parameter in adapter_parameters(self.layer):
                parameter += torch.randn_like(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


def evaluate(folder: str, classes: int, samples: int, reports: bool) -> dict[str, float]:
    """Run a test pass in this process, and return its peak memory and the size of the page."""
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="cpu",
        logger=CSVLogger(folder),
        callbacks=[ComparisonReport(verbose=False)] if reports else [],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(_Made(classes, samples), batch_size=500, collate_fn=lambda batch: batch)
    trainer.test(_Linear(classes), loader, verbose=False)
    found = {"peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    pages = [path.stat().st_size / 1e6 for path in Path(folder).rglob("report.html")]
    return found | ({"page MB": pages[0]} if pages else {})


def run() -> tuple[Table, Any]:
    """Measure, each in a process of its own, and return the table and its numbers."""
    found = {}
    for name in ("without a report", "with a report"):
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, "-m", "tests.benchmarks.report_memory", folder, name]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    table = Table("", "peak MB", "page MB", title="A test pass over 1,000,000 samples of 1,000 classes")
    for name, numbers in found.items():
        table.add_row(name, *(f"{numbers[each]:.1f}" if each in numbers else "" for each in ("peak MB", "page MB")))
    return table, found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(evaluate(sys.argv[1], 1000, 1_000_000, sys.argv[2] == "with a report")))
