"""Runs with the loaders most people write go on as if they had not been stopped."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lora_lightning import LoRAFinetuning
from lora_lightning.lora import adapter_state_dict
from tests.helpers import same

pytestmark = pytest.mark.filterwarnings(
    # Small data in the process of the test: https://github.com/Lightning-AI/pytorch-lightning/issues/19223
    "ignore:.*does not have many workers.*",
    "ignore:Checkpoint directory .* exists and is not empty",
    # Lightning does not know that the loader's state is kept: https://github.com/Lightning-AI/pytorch-lightning/pull/18210
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
)


class Samples(Dataset[tuple[Tensor, int, int]]):
    """Augments each sample with the generators of PyTorch, NumPy and Python."""

    def __init__(self) -> None:
        self.x = torch.randn(48, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        noise = torch.randn(8) + float(np.random.rand()) + random.random()  # as transforms do
        return self.x[index] + 0.1 * noise, int(self.x[index, :3].argmax()), index


class Stateful:
    """A loader with state of its own, as torchdata's."""

    def __init__(self) -> None:
        self.epoch, self.at, self.samples = 0, 0, Samples()

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[list[Any]]:
        order = torch.randperm(48, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.at < 6:
            rows = [self.samples[index] for index in order[8 * self.at : 8 * self.at + 8]]
            self.at += 1
            yield torch.utils.data.default_collate(rows)
        self.epoch, self.at = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.at = state["epoch"], state["at"]


class Module(pl.LightningModule):
    """Two layers with dropout, which remembers the samples that it saw."""

    def __init__(self, estimated: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 3))
        self.estimated, self.seen = estimated, list[list[int]]()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y, index = batch
        return x + 0.01 * torch.randn_like(x), y, index

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch[2].tolist())
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)
        steps = int(self.trainer.estimated_stepping_batches) if self.estimated else 18
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loader(kind: str) -> Any:
    if kind == "with state":
        return Stateful()
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(5)} if "generator" in kind else {}
    if "workers" in kind:
        options |= {"num_workers": 2, "multiprocessing_context": "fork"}
    return DataLoader(Samples(), batch_size=8, shuffle=True, **options)


class Stop(pl.Callback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.after:
            raise KeyboardInterrupt


def run(kind: str, folder: Path, *, stop: int = 0, ckpt_path: str | None = None, every: int | None = 1) -> Module:
    pl.seed_everything(0, verbose=False)
    module = Module(estimated="state" in kind)
    files = ModelCheckpoint(folder, every_n_train_steps=every, save_top_k=-1, filename="{step}")
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        callbacks=[LoRAFinetuning(rank=2), files, Stop(stop)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(module, loader(kind), ckpt_path=ckpt_path)
    except SystemExit:
        assert stop
    return module


KINDS = ("shuffled", "shuffled with a generator", "with state", "two workers")
BY_DEFAULT = {("shuffled", 3), ("shuffled", 6), ("shuffled with a generator", 8), ("with state", 8)}


@pytest.mark.parametrize(
    ("kind", "after"),
    [
        pytest.param(kind, after, marks=[] if (kind, after) in BY_DEFAULT else pytest.mark.slow)
        for kind in KINDS
        for after in (3, 6, 8, 12)
    ],
)
def test_a_stopped_run_goes_on_with_the_batches_and_adapters_that_it_would_have_had(
    kind: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # which a run sets, and this puts back
    whole = run(kind, tmp_path / "whole")
    run(kind, tmp_path / "half", stop=after + 1)  # after the checkpoint
    rest = run(kind, tmp_path / "rest", ckpt_path=str(tmp_path / "half" / f"step={after}.ckpt"))
    assert rest.seen == whole.seen[after:]
    assert same(adapter_state_dict(rest.net), adapter_state_dict(whole.net))


def test_a_checkpoint_at_the_end_of_an_epoch_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    whole = run("shuffled", tmp_path / "whole", every=None)
    rest = run("shuffled", tmp_path / "rest", ckpt_path=str(tmp_path / "whole" / "step=6.ckpt"), every=None)
    assert rest.seen == whole.seen[6:]
    assert same(adapter_state_dict(rest.net), adapter_state_dict(whole.net))
