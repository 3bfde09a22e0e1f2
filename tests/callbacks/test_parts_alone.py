"""The parts of `LoRAFinetuning`, each used alone by a module that attaches its adapters itself."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import load_adapter
from lora_lightning.callbacks import AdapterWriter, FiniteAdapters, FrozenBase
from lora_lightning.checkpoints import NotFiniteError
from lora_lightning.lora import LoRAConfig, adapter_parameters, adapter_state_dict, attach, merge

pytestmark = pytest.mark.filterwarnings(
    # Small data in the process of the test: https://github.com/Lightning-AI/pytorch-lightning/issues/19223
    "ignore:.*does not have many workers.*",
    "ignore:The number of training batches",
    # The Trainer's own: https://github.com/Lightning-AI/pytorch-lightning/issues/15340
    "ignore:Checkpoint directory .* exists and is not empty",
)


class Own(LightningModule):
    """Adapts its encoder itself and trains its head beside it. The second epoch has the lowest score."""

    def __init__(self, adapted: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 2)
        if adapted:
            attach(self.encoder, LoRAConfig(rank=2))
        self.of_epochs: list[dict[str, Tensor]] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.encoder(batch[0])), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("score", (1.0, 0.5, 2.0, 3.0)[self.current_epoch])

    def on_validation_end(self) -> None:
        self.of_epochs.append({key: value.clone() for key, value in adapter_state_dict(self.encoder).items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([*adapter_parameters(self.encoder), *self.head.parameters()], lr=0.05)


def loader() -> DataLoader[Any]:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)


def fit(
    module: LightningModule, folder: Path, *callbacks: Callback, epochs: int = 3, resumed: str | None = None
) -> None:
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=CSVLogger(folder), callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, loader(), loader(), ckpt_path=resumed)


def of_folder(folder: Path | str | None) -> dict[str, Tensor]:
    assert folder is not None
    network = Own(adapted=False).encoder
    load_adapter(network, folder)
    return adapter_state_dict(network)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_folder_has_the_adapters_of_the_best_epoch_and_else_the_last(tmp_path: Path) -> None:
    module, writer = Own(), AdapterWriter()
    best = ModelCheckpoint(monitor="score", save_weights_only=True)
    fit(module, tmp_path / "best", writer, best)
    assert same(of_folder(writer.folder), module.of_epochs[1])
    assert same(of_folder(best.best_model_path.replace(".ckpt", ".adapter")), module.of_epochs[1])
    assert not same(module.of_epochs[1], module.of_epochs[2])
    module = Own()
    fit(module, tmp_path / "last", writer)
    assert Path(str(writer.folder)).is_relative_to(tmp_path / "last")
    assert same(of_folder(writer.folder), module.of_epochs[2])
    pickle.dumps(writer)


def test_a_resumed_run_knows_the_best_epoch_of_before(tmp_path: Path) -> None:
    first, second, writer = Own(), Own(), AdapterWriter()
    fit(first, tmp_path / "a", writer, ModelCheckpoint(monitor="score", save_last=True), epochs=3)
    (last,) = tmp_path.rglob("last.ckpt")
    fit(second, tmp_path / "b", writer, ModelCheckpoint(monitor="score"), epochs=4, resumed=str(last))
    assert same(of_folder(writer.folder), first.of_epochs[1])
    assert not same(second.of_epochs[-1], first.of_epochs[1])


def test_a_folder_is_written_if_another_callback_fails_after_the_last_epoch(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            raise RuntimeError("no figure")

    module, writer = Own(), AdapterWriter()
    with pytest.raises(RuntimeError, match="no figure"):
        fit(module, tmp_path, Fails(), writer)
    assert same(of_folder(writer.folder), module.of_epochs[2])


def test_why_a_run_failed_is_not_hidden_if_the_adapters_are_merged(tmp_path: Path) -> None:
    class Merges(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            merge(pl_module.encoder)
            raise RuntimeError("no figure")

    with pytest.raises(RuntimeError, match="no figure") as failure:
        fit(Own(), tmp_path, Merges(), AdapterWriter())
    assert "The adapters could not be written: attach was called with 0 parts" in failure.value.__notes__[0]


def test_a_base_that_changes_is_named_and_one_that_does_not_is_said_to_be_unchanged(tmp_path: Path) -> None:
    class Leaky(Own):
        def on_train_epoch_end(self) -> None:
            self.encoder[0].bias.data += 1

    frozen = FrozenBase()
    fit(Own(), tmp_path, frozen)
    assert frozen.in_words.startswith("bitwise unchanged (SHA-256 ")
    with pytest.raises(RuntimeError, match=r"The frozen base changed during training: '0\.bias'\."):
        fit(Leaky(), tmp_path, frozen)
    assert not frozen.in_words


def test_training_stops_where_adapters_are_no_longer_finite(tmp_path: Path) -> None:
    class Diverges(Own):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return super().training_step(batch, index) * (float("nan") if index else 1)

    module = Diverges()
    with pytest.raises(NotFiniteError, match=r"has diverged: '0\.lora_weight\.default\.lora_A', .* since batch 1 "):
        fit(module, tmp_path, FiniteAdapters())
    assert module.global_step == 2


@pytest.mark.parametrize("part", [AdapterWriter, FiniteAdapters, FrozenBase])
def test_a_module_without_adapters_is_refused_before_training(part: type[Callback], tmp_path: Path) -> None:
    class Plain(Own):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    with pytest.raises(ValueError, match=r"attach was called with 0 parts of this Plain; expected one\. Call lora"):
        fit(Plain(adapted=False), tmp_path, part())
