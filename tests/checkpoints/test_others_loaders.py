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
from torch.utils.data import DataLoader, Dataset, Sampler

from lora_lightning import LoRAFinetuning
from lora_lightning.lora import adapter_state_dict
from tests.helpers import same

pytestmark = pytest.mark.filterwarnings(
    # Small data in the process of the test: https://github.com/Lightning-AI/pytorch-lightning/issues/19223
    "ignore:.*does not have many workers.*",
    "ignore:Checkpoint directory .* exists and is not empty",
    # Lightning does not know that the loader's state is kept:
    # https://github.com/Lightning-AI/pytorch-lightning/pull/18210
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
        if self.at == 6:  # nobody asked for more than the last batch
            self.epoch, self.at = self.epoch + 1, 0
        order = torch.randperm(48, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.at < 6:
            rows = [self.samples[index] for index in order[8 * self.at : 8 * self.at + 8]]
            self.at += 1
            yield torch.utils.data.default_collate(rows)

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


class Constant(Module):
    """Has no scheduler."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)


class Validated(Module):
    """Validates."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


class ByEpoch(Sampler[int]):
    """A sampler whose order is a function of the epoch, as that of `DistributedSampler`."""

    def __init__(self) -> None:
        self.epoch = 0

    def __len__(self) -> int:
        return 48

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(48, generator=torch.Generator().manual_seed(self.epoch)).tolist()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def loader(kind: str) -> Any:
    if kind == "ordered by epoch":
        return DataLoader(Samples(), batch_size=8, sampler=ByEpoch())
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


def run(
    kind: str,
    folder: Path,
    *callbacks: pl.Callback,
    stop: int = 0,
    ckpt_path: str | None = None,
    every: int | None = 1,
    of_class: type[Module] = Module,
    **options: Any,
) -> Module:
    pl.seed_everything(0, verbose=False)
    module = of_class(estimated="state" in kind)
    files = ModelCheckpoint(folder, every_n_train_steps=every, save_top_k=-1, filename="{step}")
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        callbacks=[LoRAFinetuning(rank=2), files, Stop(stop), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    of_validation = DataLoader(Samples(), batch_size=24) if of_class is Validated else None
    try:
        trainer.fit(module, loader(kind), of_validation, ckpt_path=ckpt_path)
    except SystemExit:
        assert stop
    return module


KINDS = ("shuffled", "shuffled with a generator", "ordered by epoch", "with state", "two workers")
BY_DEFAULT = {
    ("shuffled", 3),
    ("shuffled", 6),
    ("shuffled with a generator", 8),
    ("ordered by epoch", 8),
    ("with state", 8),
}


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


@pytest.mark.parametrize("kind", ["shuffled", "shuffled with a generator", "with state"])
@pytest.mark.parametrize(
    "first",
    [
        pytest.param("step=6", id="last batch"),
        pytest.param("ends/step=6", id="epoch end"),
        pytest.param("step=8", id="mid-epoch", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_resumed_is_stopped_and_resumed_again(
    kind: str, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")

    def resumed(name: str, ckpt_path: str | None) -> Module:
        ends = ModelCheckpoint(tmp_path / name / "ends", filename="{step}", save_top_k=-1)
        return run(kind, tmp_path / name, ends, ckpt_path=ckpt_path)

    whole = resumed("whole", None)
    resumed("once", str(tmp_path / "whole" / f"{first}.ckpt"))
    for after in (9, 12, 14):
        again = resumed(f"again_{after}", str(tmp_path / "once" / f"step={after}.ckpt"))
        assert again.seen == whole.seen[after:]
        assert same(adapter_state_dict(again.net), adapter_state_dict(whole.net))


def equal_after(kind: str, folder: Path, afters: list[int], **options: Any) -> dict[int, bool]:
    """Return whether runs from the checkpoints after these steps have the batches and adapters of the whole run."""
    whole = run(kind, folder / "whole", **options)
    rests = {
        after: run(kind, folder / f"rest_{after}", ckpt_path=str(folder / "whole" / f"step={after}.ckpt"), **options)
        for after in afters
    }
    state = adapter_state_dict(whole.net)
    return {
        after: rest.seen == whole.seen[after:] and same(adapter_state_dict(rest.net), state)
        for after, rest in rests.items()
    }


@pytest.mark.parametrize(
    "options", [{}, {"val_check_interval": 2}, {"val_check_interval": 4}], ids=["each epoch", "and within", "within"]
)
def test_a_run_that_was_stopped_between_a_batch_and_its_validation_goes_on_with_the_same_numbers(
    options: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    found = equal_after("shuffled", tmp_path, [4, 6, 7], of_class=Validated, **options)
    assert found == {4: True, 6: True, 7: True}


def test_validation_with_a_plain_loader_draws_no_random_number_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    once, often = (
        run(
            "shuffled",
            tmp_path / str(interval),
            of_class=Validated,
            num_sanity_val_steps=0,
            val_check_interval=interval,
        )
        for interval in (1.0, 2)
    )
    assert often.seen == once.seen
    assert same(adapter_state_dict(often.net), adapter_state_dict(once.net))


@pytest.mark.parametrize("kind", ["shuffled", "with state"])
def test_half_of_the_batches_of_each_epoch_too(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    assert equal_after(kind, tmp_path, [2, 3, 4, 6], limit_train_batches=0.5) == dict.fromkeys((2, 3, 4, 6), True)


@pytest.mark.filterwarnings("ignore:SWA is initializing after swa_start")
@pytest.mark.parametrize(("every", "exact"), [(None, True), (1, False)], ids=["at its end", "in its middle"])
def test_stochastic_weight_averaging_goes_on_exactly_or_a_warning_says_that_lightning_does_not(
    every: int | None, exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")

    def averaged(name: str, **options: Any) -> Module:
        averaging = pl.callbacks.StochasticWeightAveraging(0.02, swa_epoch_start=2, annealing_epochs=2)
        return run("shuffled", tmp_path / name, averaging, every=every, of_class=Constant, **options)

    whole = averaged("whole")
    path = str(tmp_path / "whole" / f"step={12 if exact else 6}.ckpt")
    if exact:
        rest = averaged("rest", ckpt_path=path)
    else:
        with pytest.warns(UserWarning, match="StochasticWeightAveraging does not continue exactly") as said:
            rest = averaged("rest", ckpt_path=path)
        assert sum("StochasticWeightAveraging" in str(each.message) for each in said) == 1
    assert same(adapter_state_dict(rest.net), adapter_state_dict(whole.net)) == exact


def test_a_resumed_run_saves_no_checkpoint_in_the_middle_of_an_accumulated_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    options: dict[str, Any] = {"stop": -1, "every": 2, "accumulate_grad_batches": 2}
    run("shuffled", tmp_path / "whole", **options)
    run("shuffled", tmp_path / "rest", ckpt_path=str(tmp_path / "whole" / "step=2.ckpt"), **options)
    assert {file.name for file in (tmp_path / "rest").glob("*.ckpt")} == {f"step={step}.ckpt" for step in (4, 6, 8)}
