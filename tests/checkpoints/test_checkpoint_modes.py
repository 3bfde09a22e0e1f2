"""Adapters in every kind of checkpoint that Lightning makes, and files that can't be written."""

from __future__ import annotations

import copy
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import Classifier, LoRAFinetuning, RichBoyNet
from lora_lightning.checkpoints import AtomicCheckpointIO, last_checkpoint, newest_checkpoint
from lora_lightning.checkpoints.started_from import StartedFrom
from lora_lightning.lora import adapter_state_dict, base_fingerprint

MakeTrainer = Callable[..., Trainer]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:You defined a `validation_step`",
    # Of Lightning, to whoever tests a checkpoint without the ModelCheckpoint that made it, or lets it look for a rate.
    "ignore:You're resuming from a checkpoint that ended before the epoch",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:`.fit.ckpt_path=None.` was called without a model",
)


class Own(pl.LightningModule):
    """A module of a user's own, which knows nothing of adapters."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=self.hparams.lr)


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8, generator=generator)


MODES: dict[str, dict[str, Any]] = {
    "every epoch": {},
    "all kept": {"save_top_k": -1},
    "the best by a metric": {"monitor": "val_loss", "save_top_k": 2},
    "weights only": {"save_weights_only": True},
    "last": {"save_last": True, "save_top_k": 0, "every_n_train_steps": 3},
    "last as a link": {"save_last": "link"},
    "every n steps": {"every_n_train_steps": 2, "save_top_k": -1},
}


@pytest.mark.parametrize("mode", MODES)
def test_checkpoints_of_every_mode_hold_the_adapters_alone_and_are_taken_strictly(
    mode: str, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    base = Own()
    module = copy.deepcopy(base)
    files = ModelCheckpoint(tmp_path / "c", **MODES[mode])
    trainer = make_trainer(LoRAFinetuning(rank=2), files, max_epochs=2)
    trainer.fit(module, data(), data())
    paths = sorted((tmp_path / "c").glob("*.ckpt"))
    assert paths
    for path in paths:
        checkpoint = torch.load(path, weights_only=True)
        assert set(checkpoint["state_dict"]) == set(adapter_state_dict(module))
        assert ("optimizer_states" in checkpoint) == (mode != "weights only")
        for verb in ("validate", "test"):
            other = copy.deepcopy(base)
            getattr(make_trainer(LoRAFinetuning(rank=2)), verb)(other, data(), ckpt_path=path, verbose=False)
            state = adapter_state_dict(other)
            assert all(torch.equal(state[key], value) for key, value in checkpoint["state_dict"].items())
    trainer.test(module, data(), ckpt_path="best" if mode not in ("last",) else "last", verbose=False)
    assert base_fingerprint(module.net) == base_fingerprint(base.net)


class Fail(Callback):
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 4:
            raise ArithmeticError


@pytest.mark.filterwarnings('ignore:.fit.ckpt_path="last". is set')  # which Lightning does itself beside that callback
def test_a_checkpoint_made_on_an_exception_is_taken(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    base, kept = Own(), tmp_path / "kept.ckpt"

    class Keep(OnExceptionCheckpoint):
        def on_exception(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            super().on_exception(trainer, *args, **kwargs)
            Path(self.ckpt_path).rename(kept)  # Lightning removes it when the trainer is torn down

    with pytest.raises(ArithmeticError):
        make_trainer(LoRAFinetuning(rank=2), Fail(), Keep(tmp_path), max_epochs=2).fit(copy.deepcopy(base), data())
    trainer = make_trainer(LoRAFinetuning(rank=2), max_epochs=2)
    trainer.fit(copy.deepcopy(base), data(), ckpt_path=kept)
    assert trainer.global_step == 10


def test_an_adapter_checkpoint_is_half_a_percent_of_the_base_at_most(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    images = DataLoader(TensorDataset(torch.randn(8, 1, 28, 28), torch.arange(8)), batch_size=8)
    module = Classifier(RichBoyNet())
    sizes = {}
    for name, callbacks in {"base": [], "adapters": [LoRAFinetuning(rank=1)]}.items():
        files = ModelCheckpoint(tmp_path / name, filename="one")
        trainer = make_trainer(*callbacks, files, max_epochs=1, limit_val_batches=0)
        trainer.fit(module, images)
        sizes[name] = (tmp_path / name / "one.ckpt").stat().st_size
    assert "optimizer_states" in torch.load(tmp_path / "adapters" / "one.ckpt", weights_only=True)
    assert sizes["adapters"] <= 0.005 * sizes["base"], sizes


def test_the_learning_rate_finder_leaves_adapters_and_base_as_they_were(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = Own()
    module = copy.deepcopy(base)
    trainer = make_trainer(LoRAFinetuning(rank=2), default_root_dir=tmp_path, max_epochs=2)
    found = Tuner(trainer).lr_find(module, data(), num_training=10, min_lr=1e-5)
    assert found is not None
    assert len(found.results["lr"]) == 10
    assert base_fingerprint(module.net) == base_fingerprint(base.net)
    assert not any(value.any() for key, value in adapter_state_dict(module).items() if key.endswith("lora_B"))
    trainer.fit(module, data())
    assert any(value.any() for key, value in adapter_state_dict(module).items() if key.endswith("lora_B"))


class FullDisk(TorchCheckpointIO):
    """Writes half a file, then has no room left; or dies there, as a killed process does."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        Path(path).write_bytes(b"half")
        raise self.error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SystemExit(9)])
def test_a_save_that_fails_leaves_the_previous_checkpoint_whole(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "c" / "last.ckpt"
    AtomicCheckpointIO(TorchCheckpointIO()).save_checkpoint({"state_dict": {"a": torch.ones(3)}}, path)
    kind, message = (OSError, "could not be written .No space left on device.. Earlier checkpoints are intact")
    if not isinstance(error, OSError):
        kind, message = (SystemExit, "9")
    with pytest.raises(kind, match=message):
        AtomicCheckpointIO(FullDisk(error)).save_checkpoint({"state_dict": {"a": torch.zeros(3)}}, path)
    loaded = AtomicCheckpointIO(TorchCheckpointIO()).load_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["a"], torch.ones(3))
    assert [file.name for file in path.parent.glob("*.ckpt")] == ["last.ckpt"]


def test_a_folder_that_is_a_file_ends_the_save_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("not a folder")
    with pytest.raises(
        OSError, match=r"The checkpoint .*last\.ckpt could not be written \((File exists|Not a directory)"
    ):
        AtomicCheckpointIO(TorchCheckpointIO()).save_checkpoint({}, tmp_path / "c" / "last.ckpt")


def test_a_full_disk_leaves_no_part_of_the_note_where_a_run_started_so_the_next_one_finds_the_last_checkpoint(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs, write = tmp_path / "logs" / "test", Path.write_text
    make_trainer(StartedFrom(), max_epochs=1).fit(Own(), data())
    (checkpoint,) = logs.rglob("*.ckpt")
    started_from, *how_it_ended = (logs / "version_0" / "started_from.txt").read_text().splitlines()
    assert started_from == ""
    assert how_it_ended[0] == "finished after steps: 5"

    def fill(path: Path, text: str, *arguments: Any, **keywords: Any) -> int:
        write(path, text[:0], *arguments, **keywords)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fill)
        trainer = make_trainer(StartedFrom(), max_epochs=1, enable_checkpointing=False)
        with pytest.warns(UserWarning, match=r"started_from.txt could not be written \(No space left on device\)"):
            trainer.fit(Own(), data(), ckpt_path=checkpoint)
    assert not list((logs / "version_1").glob("*started_from*"))
    assert last_checkpoint(logs) == checkpoint


def test_a_link_to_a_checkpoint_that_a_killed_run_has_replaced_is_no_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "version_0"
    folder.mkdir()
    (folder / "last.ckpt").symlink_to(folder / "step=1.ckpt")
    (folder / "step=2.ckpt").touch()
    assert newest_checkpoint(tmp_path) == last_checkpoint(tmp_path) == folder / "step=2.ckpt"


class FolderIO(TorchCheckpointIO):
    """Writes each checkpoint as a folder, as distributed and sharded formats do."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).mkdir()
        super().save_checkpoint(checkpoint, Path(path) / "content.pt", storage_options)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return super().load_checkpoint(Path(path) / "content.pt", map_location, weights_only)


def test_a_checkpoint_io_that_writes_folders_saves_again_and_again_and_reads(tmp_path: Path) -> None:
    files, path = AtomicCheckpointIO(FolderIO()), tmp_path / "checkpoints" / "last.ckpt"
    for value in (1, 2):
        files.save_checkpoint({"state_dict": {"a": torch.full((3,), value)}}, path)
        assert torch.equal(files.load_checkpoint(path)["state_dict"]["a"], torch.full((3,), value))
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"], "nothing unfinished is left"
