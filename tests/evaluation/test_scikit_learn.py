"""Counts and errors are those of scikit-learn, whatever the size of a batch and the number of processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn import metrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import ComparisonReport, LoRAConfig
from lora_lightning.data.samplers import UnrepeatedSampler
from lora_lightning.lora import adapter_parameters, attach, disabled
from tests import processes
from tests.processes import free_ports

SIZES = (1, 2, 7, 64)
N = 131
TARGETS = {
    "classes": torch.randint(5, (N,), generator=torch.Generator().manual_seed(1)),
    "labels": torch.randint(2, (N, 3), generator=torch.Generator().manual_seed(2)).float(),
    "values": 7 + torch.randn(N, generator=torch.Generator().manual_seed(3)),
    "several values": torch.tensor([1, 100, 1e6]) + torch.randn(N, 3, generator=torch.Generator().manual_seed(4)),
}
OUTPUTS = {"classes": 5, "labels": 3, "values": 1, "several values": 3}


class Net(LightningModule):
    """A linear layer with adapters that do something."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layer = nn.Linear(6, outputs)
        attach(self.layer, LoRAConfig(rank=2))
        with torch.no_grad():
            for parameter in adapter_parameters(self.layer):
                parameter += torch.randn(parameter.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])


def compare(kind: str, size: int, devices: int = 1) -> None:
    """Compare the report of a pass in batches of this size on several processes with scikit-learn."""
    inputs, targets = torch.randn(N, 6, generator=torch.Generator().manual_seed(0)).double(), TARGETS[kind]
    # In double precision, since a layer rounds differently for each size of the batch.
    module, callback = Net(OUTPUTS[kind]).double(), ComparisonReport(verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    data = TensorDataset(inputs, targets)
    sampler = UnrepeatedSampler(N, num_replicas=devices, rank=trainer.global_rank) if devices > 1 else None
    trainer.test(module, DataLoader(data, batch_size=size, sampler=sampler), verbose=False)
    report = callback.report
    assert report is not None
    with torch.no_grad():
        outputs = {"adapted": module.cpu()(inputs)}
        with disabled(module):
            outputs["base"] = module(inputs)
    for name, result in (("adapted", report.adapted), ("base", report.base)):
        found, true = outputs[name].numpy(), targets.numpy()
        if kind == "classes":
            assert result.matrix.tolist() == metrics.confusion_matrix(true, found.argmax(1)).tolist()
        elif kind == "labels":
            columns = result.true_negatives, result.false_positives, result.false_negatives, result.true_positives
            expected = metrics.multilabel_confusion_matrix(true, found > 0).reshape(3, 4)
            assert [list(each) for each in zip(*columns, strict=True)] == expected.tolist()
            assert result.accuracy == metrics.accuracy_score(true, found > 0)
        else:
            known, predicted = true.astype(float), found.reshape(true.shape)
            assert result.mae == pytest.approx(metrics.mean_absolute_error(known, predicted), rel=1e-12)
            assert result.mse == pytest.approx(metrics.mean_squared_error(known, predicted), rel=1e-12)
            assert result.rmse == pytest.approx(metrics.root_mean_squared_error(known, predicted), rel=1e-12)
            assert result.r2 == pytest.approx(metrics.r2_score(known, predicted), rel=1e-9)
            assert result.bias == pytest.approx(float((predicted - known).mean()), rel=1e-9)


def compare_all(rank: int, devices: int, port: int) -> None:
    """Compare all kinds in batches of all sizes, as one of several processes that an outer program has started."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    for kind in TARGETS:
        for size in SIZES:
            compare(kind, size, devices)


SCRIPT = """
import warnings
import torch.multiprocessing
from tests.evaluation.test_scikit_learn import compare_all
warnings.simplefilter("ignore")
torch.multiprocessing.start_processes(compare_all, ({devices}, {port}), nprocs={devices}, start_method="fork")
"""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", TARGETS)
def test_one_process(kind: str, size: int) -> None:
    compare(kind, size)


@pytest.mark.slow  # tests/test_devices.py counts digits on two devices
@pytest.mark.parametrize("devices", [2, 3])
def test_several_processes(devices: int, tmp_path: Path) -> None:
    script = tmp_path / "compare.py"
    script.write_text(SCRIPT.format(devices=devices, port=free_ports(1)[0]))
    processes.run(str(script), folder=tmp_path)
