"""`LoRAFinetuning` in trainings as others write them."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import ConfusionReport, LoRAFinetuning
from lora_lightning.callbacks.merging import load_merged
from lora_lightning.checkpoints import NotFiniteError, newest_checkpoint
from lora_lightning.lora import adapted_weights, adapter_parameters, adapter_state_dict, base_fingerprint, merge
from tests import processes
from tests.helpers import same, state

MakeTrainer = Callable[..., Trainer]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:You defined a `validation_step`",
    "ignore:The number of training batches",
)


def data() -> DataLoader[Any]:
    x = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.argmax(1) % 3), batch_size=8)


class Two(pl.LightningModule):
    """Two children that hold parameters, as most modules have them."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        self.body, self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_adapters_stay_in_float32_in_a_run_of_low_precision(precision: str, make_trainer: MakeTrainer) -> None:
    module = Two()
    make_trainer(LoRAFinetuning(rank=2), max_epochs=1, precision=precision).fit(module, data())
    assert module.head.weight.dtype != torch.float32
    assert {parameter.dtype for parameter in adapter_parameters(module)} == {torch.float32}
    assert module.head.lora_weight.default.lora_B.any()


class Later(Two):
    """Makes its head, or all of its layers, in a hook: Lightning's advice for large models."""

    def __init__(self, hook: str = "configure_model", all_layers: bool = False) -> None:
        torch.manual_seed(2)
        super().__init__()
        self.hook = hook
        del self.head
        if all_layers:
            del self.body

    def make(self) -> None:
        torch.manual_seed(3)
        if not hasattr(self, "body"):
            self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        if not hasattr(self, "head"):
            self.head = nn.Linear(8, 3)

    def setup(self, stage: str) -> None:
        if self.hook == "setup":
            self.make()

    def configure_model(self) -> None:
        if self.hook == "configure_model":
            self.make()


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
@pytest.mark.parametrize("all_layers", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_layers_made_in_a_hook_are_adapted(
    make_trainer: MakeTrainer, hook: str, all_layers: bool, precision: Any
) -> None:
    module = Later(hook, all_layers)
    trainer = make_trainer(LoRAFinetuning(rank=2), max_epochs=2, precision=precision)
    trainer.fit(module, data())
    assert {key for key, value in adapter_state_dict(module).items() if value.any()} == {
        f"{name}.lora_weight.default.lora_{factor}" for name in ("body.0", "head") for factor in "AB"
    }
    assert {value.dtype for value in adapter_state_dict(module).values()} == {torch.float32}
    assert not {"setup", "configure_model"} & vars(module).keys()
    trainer.test(module, data(), verbose=False)
    checkpoint = trainer.checkpoint_callback.best_model_path
    again = Later(hook, all_layers)
    make_trainer(LoRAFinetuning(rank=2), precision=precision).test(again, data(), ckpt_path=checkpoint, verbose=False)
    assert same(dict(again.state_dict()), dict(module.state_dict()))


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_a_model_whose_layers_are_made_late_is_merged_from_a_checkpoint(make_trainer: MakeTrainer, hook: str) -> None:
    module = Later(hook, all_layers=True)
    trainer = make_trainer(LoRAFinetuning(rank=2), max_epochs=1)
    trainer.fit(module, data())
    merged = Later(hook, all_layers=True)
    load_merged(make_trainer(LoRAFinetuning(rank=2)), merged, trainer.checkpoint_callback.best_model_path)
    merge(module)
    assert same(dict(merged.state_dict()), dict(module.state_dict()))


def test_layers_made_in_configure_model_take_a_base_and_resume_bitwise(make_trainer: MakeTrainer) -> None:
    base = Later(all_layers=True)
    make_trainer(max_epochs=1).fit(base, data())
    trainer = make_trainer(max_epochs=1)
    trainer.fit(base, data())
    path = trainer.checkpoint_callback.best_model_path
    runs = []
    for epochs in (3, 2):
        module = Later(all_layers=True)
        trainer = make_trainer(LoRAFinetuning(rank=2, base_checkpoint=path), max_epochs=epochs)
        trainer.fit(module, data())
        runs.append((module, trainer.checkpoint_callback.best_model_path))
    resumed = Later(all_layers=True)
    trainer = make_trainer(LoRAFinetuning(rank=2, base_checkpoint=path), max_epochs=3)
    trainer.fit(resumed, data(), ckpt_path=runs[1][1])
    assert same(dict(resumed.state_dict()), dict(runs[0][0].state_dict()))
    assert torch.equal(resumed.body[0]._parameters["weight"], base.body[0].weight)


class Whole(Two):
    """Its one child holds all parameters, and is what is adapted."""

    def __init__(self) -> None:
        super().__init__()
        del self.body, self.head
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize(
    "names",
    [["0", "3"], ["net.0", "net.3"], r"net\.[03]", r"[03]"],
    ids=["list", "whole list", "whole pattern", "pattern"],
)
def test_layers_are_named_as_the_module_or_its_child_sees_them(make_trainer: MakeTrainer, names: Any) -> None:
    module = Whole()
    ranks = {"net.3" if "net" in str(names) else "3": 1}
    callback = LoRAFinetuning(rank=2, target_modules=names, rank_pattern=ranks, modules_to_save=["net.2"])
    make_trainer(callback, max_epochs=1).fit(module, data())
    assert {each.name: each.rank for each in adapted_weights(module.net)} == {"0": 2, "3": 1}
    assert module.net[2].weight.requires_grad


def test_weights_that_are_shared_are_named_when_adapters_are_attached(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    module = Two()
    module.head = nn.Linear(8, 8)
    module.head.weight = module.body[0].weight
    with caplog.at_level("INFO"):
        make_trainer(LoRAFinetuning(rank=2), max_epochs=1).fit(module, data())
    assert "head shares its weight (body.0.weight, head.weight): the adapter only affects head" in caplog.text


class TestOptimizers:
    def test_layers_made_after_the_adapters_do_not_train_in_full_unnoticed(self, make_trainer: MakeTrainer) -> None:
        class Last(Two):
            def configure_optimizers(self) -> torch.optim.Optimizer:
                self.extra = nn.Linear(3, 3)
                return super().configure_optimizers()

        with pytest.raises(ValueError, match=r"has 'extra.weight', 'extra.bias', which are not adapters"):
            make_trainer(LoRAFinetuning(rank=2), max_epochs=1).fit(Last(), data())

    def test_parameters_listed_before_the_adapters_existed(self, make_trainer: MakeTrainer) -> None:
        class Listed(Two):
            def __init__(self) -> None:
                super().__init__()
                self.listed = list(self.parameters())

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.AdamW(self.listed)

        with pytest.raises(
            ValueError, match=r"does not have 'body.0.lora_weight.default.lora_A', .* would never be trained"
        ):
            make_trainer(LoRAFinetuning(rank=2), max_epochs=1).fit(Listed(), data())

    def test_those_of_the_head_alone(self, make_trainer: MakeTrainer) -> None:
        class Head(Two):
            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.AdamW(self.head.parameters())

        with pytest.raises(
            ValueError,
            match=r"does not have 'body.0.lora_weight.default.lora_A', 'body.0.lora_weight.default.lora_B': these",
        ):
            make_trainer(LoRAFinetuning(rank=2), max_epochs=1).fit(Head(), data())
        make_trainer(LoRAFinetuning(rank=2, target_modules=["head"]), max_epochs=1).fit(Head(), data())

    def test_several_optimizers_by_hand_are_counted_together(self, make_trainer: MakeTrainer) -> None:
        class ByHand(Two):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                for optimizer in self.optimizers():
                    optimizer.step()

            def configure_optimizers(self) -> list[torch.optim.Optimizer]:
                return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.body, self.head)]

        module = ByHand()
        make_trainer(LoRAFinetuning(rank=2), max_epochs=1).fit(module, data())
        assert all(value.any() for value in adapter_state_dict(module).values())

    @pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
    def test_a_base_that_another_callback_unfreezes_is_found_in_that_epoch(self, make_trainer: MakeTrainer) -> None:
        class Unfreezing(pl.Callback):
            def on_train_epoch_start(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
                if trainer.current_epoch == 1:
                    BaseFinetuning.unfreeze_and_add_param_group(pl_module.body, trainer.optimizers[0])

        trainer = make_trainer(LoRAFinetuning(rank=2), Unfreezing(), max_epochs=3)
        with pytest.raises(ValueError, match=r"has 'body.0.weight', 'body.0.bias', .* remove callbacks like BackboneF"):
            trainer.fit(Two(), data())
        assert trainer.current_epoch == 1

    @pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
    def test_a_fit_without_an_optimizer_runs_as_in_lightning(self, make_trainer: MakeTrainer) -> None:
        class NoOptimizer(Two):
            def configure_optimizers(self) -> None:
                return None

        module = NoOptimizer()
        callbacks = [LoRAFinetuning(rank=2, verify=False), ConfusionReport()]
        make_trainer(*callbacks, max_epochs=1, log_every_n_steps=1).fit(module, data())
        assert not module.head.lora_weight.default.lora_B.any()


@pytest.mark.filterwarnings("ignore:Buffers of the base changed during training")
def test_pruning_is_refused_for_the_base_and_works_for_layers_trained_in_full(make_trainer: MakeTrainer) -> None:
    module = Two()
    with pytest.raises(ValueError, match=r"frozen parameters: .* of a LoRALinear.*Prune the base before"):
        make_trainer(LoRAFinetuning(rank=2), ModelPruning("l1_unstructured", amount=0.5)).fit(module, data())
    module = Two()
    pruning = ModelPruning("l1_unstructured", parameters_to_prune=[(module.head, "weight")], amount=0.5)
    adapters = LoRAFinetuning(rank=2, target_modules=["body.0"], modules_to_save=["head"])
    make_trainer(adapters, pruning, max_epochs=1).fit(module, data())
    assert (module.head.weight == 0).float().mean() == 0.5


class Searched(Two):
    """Has a loader whose batch size Lightning can change."""

    def __init__(self) -> None:
        torch.manual_seed(2)
        super().__init__()
        self.batch_size = 8

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data().dataset, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return data()


@pytest.mark.parametrize(
    "search", [LearningRateFinder(num_training_steps=20, update_attr=False), BatchSizeFinder(init_val=2, max_trials=3)]
)
def test_a_search_before_the_training_leaves_the_adapters_as_they_were(
    search: pl.Callback, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """The search for the batch size ends with that of the module."""
    trained = []
    for callbacks in ([], [search]):
        torch.manual_seed(4)
        module = Searched()
        torch.manual_seed(4)
        trainer = make_trainer(LoRAFinetuning(rank=2), *callbacks, max_epochs=2, default_root_dir=tmp_path)
        trainer.fit(module)
        assert (module.batch_size, trainer.global_step) == (8, 6)
        trained.append(state(module))
    assert same(*trained)
    assert not list(tmp_path.glob("*.ckpt"))


def test_configure_optimizers_set_on_the_instance_stays_there(make_trainer: MakeTrainer) -> None:
    module = Two()

    def configure() -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.01)

    module.configure_optimizers = configure
    for _ in range(2):
        trainer = make_trainer(LoRAFinetuning(rank=2), max_epochs=1)
        trainer.fit(module, data())
        assert isinstance(trainer.optimizers[0], torch.optim.SGD)
        assert module.configure_optimizers is configure
        merge(module)


class TestCheckpointsAfterwards:
    def test_a_merged_model_is_saved_whole(self, make_trainer: MakeTrainer, tmp_path: Path) -> None:
        module = Two()
        trainer = make_trainer(LoRAFinetuning(rank=2), max_epochs=1)
        trainer.fit(module, data())
        trainer.save_checkpoint(tmp_path / "adapters.ckpt")
        merge(module)
        trainer.save_checkpoint(tmp_path / "merged.ckpt")
        saved = torch.load(tmp_path / "merged.ckpt", weights_only=True)["state_dict"]
        assert same(saved, dict(module.state_dict()))
        Two().load_state_dict(saved)
        assert set(torch.load(tmp_path / "adapters.ckpt", weights_only=True)["state_dict"]) == {
            f"{layer}.lora_weight.default.lora_{factor}" for layer in ("body.0", "head") for factor in "AB"
        }

    def test_another_model_of_the_same_trainer_is_saved_whole(self, make_trainer: MakeTrainer, tmp_path: Path) -> None:
        trainer = make_trainer(LoRAFinetuning(rank=2), max_epochs=1, enable_checkpointing=False)
        trainer.fit(Two(), data())
        trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, LoRAFinetuning)]
        other = Two()
        trainer.fit_loop.max_epochs = 2
        trainer.fit(other, data())
        trainer.save_checkpoint(tmp_path / "other.ckpt")
        assert same(torch.load(tmp_path / "other.ckpt", weights_only=True)["state_dict"], dict(other.state_dict()))


class TestFolders:
    def test_a_remote_log_folder_gets_all_files_and_no_local_one_of_its_name(
        self, make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        callback = LoRAFinetuning(rank=2)
        trainer = make_trainer(
            callback,
            ConfusionReport(verbose=False),
            max_epochs=1,
            logger=CSVLogger("memory://runs"),
            default_root_dir="memory://runs",
            enable_checkpointing=False,
        )
        module = Two()
        trainer.fit(module, data(), data())
        trainer.test(module, data(), verbose=False)
        assert not [path for path in tmp_path.iterdir() if "memory" in path.name]
        files = {path.rpartition("/")[2] for path in fsspec.filesystem("memory").find("/runs")}
        assert {"adapter_config.json", "adapter_model.safetensors", "curves.png", "confusion.json"} <= files
        assert str(callback.adapter_folder).startswith("memory://runs/")

    def test_without_a_logger_the_adapter_is_beside_the_checkpoints(
        self, make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        callback = LoRAFinetuning(rank=2)
        make_trainer(callback, max_epochs=1, logger=False).fit(Two(), data())
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
        assert (tmp_path / "checkpoints/adapter/adapter_config.json").is_file()
        make_trainer(LoRAFinetuning(rank=2), max_epochs=1, logger=False, enable_checkpointing=False).fit(Two(), data())
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


class TestDivergedTraining:
    @pytest.mark.parametrize("save_on_exception", [False, True])
    def test_ends_with_the_batch_and_keeps_the_last_finite_checkpoint(
        self, save_on_exception: bool, make_trainer: MakeTrainer, tmp_path: Path
    ) -> None:
        class Diverging(Two):
            def on_train_epoch_start(self) -> None:
                if self.current_epoch == 2:
                    for group in self.optimizers().param_groups:
                        group["lr"] = 1e30

        files = ModelCheckpoint(tmp_path / "c", save_on_exception=save_on_exception, save_last=True)
        callback = LoRAFinetuning(rank=2)
        with pytest.raises(NotFiniteError, match=r"contain NaN or infinity since batch [78] .*c/last.ckpt, is finite"):
            make_trainer(callback, files, max_epochs=4).fit(Diverging(), data())
        assert callback.adapter_folder is None
        for path in (tmp_path / "c").glob("*.ckpt"):
            content = torch.load(path, weights_only=True)
            assert content["global_step"] == 6
            assert all(value.isfinite().all() for value in content["state_dict"].values())

    def test_a_single_loss_that_is_not_finite_ends_nothing(self, make_trainer: MakeTrainer) -> None:
        class Spike(Two):
            def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
                loss = super().training_step(batch, batch_idx)
                return (
                    loss if batch_idx else loss.detach() * float("nan") + 0 * loss.nan_to_num().detach() + loss - loss
                )

            def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
                for parameter in self.parameters():
                    if parameter.grad is not None:
                        parameter.grad.nan_to_num_()

        module = Spike()
        make_trainer(LoRAFinetuning(rank=2), max_epochs=1).fit(module, data())
        assert all(value.isfinite().all() for value in adapter_state_dict(module).values())


@dataclass
class Output:
    logits: Tensor | None


class LSTMLoop(Two):
    """A cell that is called for every step of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTMCell(1, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 8)
        for step in range(x.shape[1]):
            h, c = self.body(x[:, step : step + 1], (h, c))
        return self.head(h)


class TakingTurns(Two):
    """Heads of which each batch uses another one, and one that has its turn in the second epoch only."""

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        early = self.current_epoch == 0
        head = (self.head, self.others[0])[batch_idx % 2] if early else self.others[1]
        return nn.functional.cross_entropy(head(self.body(x)), y)


class Dataclass(Two):
    """Its body returns an object, and sometimes nothing."""

    def __init__(self) -> None:
        super().__init__()

        class Body(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(8, 8)

            def forward(self, x: Tensor, found: bool = True) -> Output:
                return Output(self.linear(x).relu() if found else None)

        self.body = Body()

    def forward(self, x: Tensor) -> Tensor:
        output = self.body(x).logits
        assert output is not None
        assert self.body(x, found=False).logits is None
        return self.head(output)


class Forces(Two):
    """Differentiates inside of forward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.head(self.body(x)).square().sum()
            [force] = torch.autograd.grad(energy, x, create_graph=True)
        return force[:, :3]


class StochasticDepth(Two):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if not self.training or torch.rand(()) < 0.8:
            x = x + self.branch(x)
        return self.head(x)


@pytest.mark.parametrize("kind", [LSTMLoop, Dataclass, Forces, StochasticDepth], ids=lambda kind: kind.__name__)
def test_a_healthy_run_of_an_unusual_module_ends_well_without_a_warning(
    kind: type[Two], make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    module = kind()
    digest = base_fingerprint(module)
    trainer = make_trainer(LoRAFinetuning(rank=2), max_epochs=2, inference_mode=False)
    trainer.fit(module, data(), data())
    trainer.test(module, data(), verbose=False)
    assert "The base is bitwise unchanged" in caplog.text
    assert base_fingerprint(module) == digest


def test_heads_that_take_turns_are_named_and_trained_on(make_trainer: MakeTrainer) -> None:
    module = TakingTurns()
    with pytest.warns(UserWarning, match="has not changed the adapters of 'others.1': no gradient has reached them"):
        make_trainer(LoRAFinetuning(rank=2), max_epochs=2).fit(module, data())
    assert module.others[1].lora_weight.default.lora_B.any()


def test_a_decoder_that_training_never_calls_is_named(make_trainer: MakeTrainer) -> None:
    class EncoderAlone(Two):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return self.body(batch[0]).square().mean()

    with pytest.warns(UserWarning, match="has not changed the adapters of 'head': no gradient has reached them"):
        make_trainer(LoRAFinetuning(rank=2), max_epochs=1).fit(EncoderAlone(), data())


def test_branches_that_begin_at_zero_are_named_and_end_nothing(make_trainer: MakeTrainer) -> None:
    class Zero(Two):
        def __init__(self) -> None:
            super().__init__()
            self.branch, self.gamma = nn.Linear(8, 8), nn.Parameter(torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return self.head(x + self.gamma * self.branch(x))

    with pytest.warns(UserWarning, match="has not changed the adapters of 'branch'"):
        make_trainer(LoRAFinetuning(rank=2), max_epochs=1).fit(Zero(), data())


def test_ddp_on_one_device_trains_a_module_of_several_children(tmp_path: Path) -> None:
    run_script(
        tmp_path,
        """
        module = Two()
        trainer(LoRAFinetuning(rank=2), strategy="ddp", devices=1, max_epochs=1).fit(module, data())
        assert all(value.any() for value in adapter_state_dict(module).values())
        """,
        may_be_forked=True,
    )


SCRIPT = """
import os, sys, torch
from pathlib import Path
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lora_lightning import LoRAFinetuning, load_adapter
from lora_lightning.lora import adapter_state_dict, is_adapted
from tests.callbacks.test_others_runs import Two, data

# Gloo's threads, which Lightning leaves running, abort about one in seven of the processes as they exit:
# https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/fabric/utilities/distributed.py#L285
import atexit
import torch.distributed
atexit.register(lambda: torch.distributed.is_initialized() and torch.distributed.destroy_process_group())

def trainer(*callbacks, **arguments):
    settings = dict(accelerator="cpu", logger=CSVLogger("logs"), enable_progress_bar=False, enable_model_summary=False,
                    log_every_n_steps=1, callbacks=list(callbacks))
    return Trainer(**(settings | arguments))

if __name__ == "__main__":
"""


def run_script(folder: Path, code: str, may_be_forked: bool = False) -> str:
    """Run a script; `may_be_forked` if it starts no process that imports the script."""
    (folder / "run.py").write_text(SCRIPT + textwrap.indent(textwrap.dedent(code), "    "))
    if may_be_forked:
        return processes.run("run.py", folder=folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(processes.ROOT)}
    environment.pop("PL_GLOBAL_SEED", None)
    outcome = subprocess.run(
        [sys.executable, "run.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout + outcome.stderr


@pytest.mark.parametrize(
    "strategy", ["ddp_fork", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp_spawn", "ddp_notebook"))]
)
def test_a_strategy_that_starts_processes_of_its_own_tests_what_it_trained(strategy: str, tmp_path: Path) -> None:
    output = run_script(
        tmp_path,
        f"""
        torch.manual_seed(0)
        module = Two()
        strategy = dict(strategy={strategy!r}, devices=2)
        base = trainer(strategy="auto").test(module, data(), verbose=False)[0]["test_loss"]
        files = ModelCheckpoint("c", save_last=True)
        each = trainer(LoRAFinetuning(rank=2), files, max_epochs=8, **strategy)
        each.fit(module, data())
        tested = each.test(module, data(), verbose=False)[0]["test_loss"]
        again = each.test(module, data(), ckpt_path="c/last.ckpt", verbose=False)[0]["test_loss"]
        assert tested == again, (tested, again)
        assert tested < 0.9 * base, (tested, base)
        assert not is_adapted(module)
        [folder] = Path("logs").rglob("adapter")
        load_adapter(module, folder, strict=True)
        here = trainer(strategy="auto").test(module, data(), verbose=False)[0]["test_loss"]
        assert abs(here - tested) < 1e-3, (here, tested)
        """,
        may_be_forked=strategy != "ddp_spawn",
    )
    assert "The model in the main process has none" in output


@pytest.mark.slow
def test_two_devices_without_a_seed_read_their_own_checkpoint(tmp_path: Path) -> None:
    run_script(
        tmp_path,
        """
        if "LOCAL_RANK" in os.environ:
            torch.manual_seed(100 + int(os.environ["LOCAL_RANK"]))
        files = ModelCheckpoint("c", save_last=True)
        two = dict(strategy="ddp", devices=2)
        module = Two()
        each = trainer(LoRAFinetuning(rank=2), files, max_epochs=1, **two)
        each.fit(module, data())
        each.fit_loop.max_epochs = 2
        each.fit(module, data(), ckpt_path="c/last.ckpt")
        each.test(module, data(), ckpt_path="c/last.ckpt", verbose=False)
        """,
    )


class TestWeightAveraging:
    @pytest.mark.parametrize("first", [True, False])
    @pytest.mark.parametrize("by_epoch", [True, False])
    def test_averages_what_trains_and_leaves_the_base_alone(
        self, first: bool, by_epoch: bool, make_trainer: MakeTrainer, tmp_path: Path
    ) -> None:
        module = Two()
        module.body.append(nn.BatchNorm1d(8))
        base = copy.deepcopy(module.state_dict())
        arguments = {"update_every_n_steps": 0, "update_starting_at_epoch": 0} if by_epoch else {}
        averaging = EMAWeightAveraging(decay=0.3, **arguments)
        callbacks = [averaging, LoRAFinetuning(rank=2)] if first else [LoRAFinetuning(rank=2), averaging]
        files = ModelCheckpoint(tmp_path / "c", save_last=True)
        seen: list[dict[str, Tensor]] = []

        class Look(pl.Callback):
            def on_validation_batch_end(self, trainer: Trainer, pl_module: pl.LightningModule, *_: object) -> None:
                seen.append({key: value.clone() for key, value in pl_module.state_dict().items() if key in base})

        trainer = make_trainer(*callbacks, Look(), files, max_epochs=3, num_sanity_val_steps=0)
        trainer.fit(module, data(), data())
        live = module.state_dict()
        for each in (*seen, live):
            assert all(torch.equal(each[key], value) for key, value in base.items())
        content = torch.load(tmp_path / "c" / "last.ckpt", weights_only=True)
        assert set(content["state_dict"]) == set(content["current_model_state"]) == set(adapter_state_dict(module))
        assert any(
            not torch.equal(value, content["current_model_state"][key]) for key, value in content["state_dict"].items()
        )
        other = Two()
        other.body.append(nn.BatchNorm1d(8))
        other.load_state_dict(base)
        callbacks = [EMAWeightAveraging(decay=0.3, **arguments), LoRAFinetuning(rank=2)]
        trainer = make_trainer(*(callbacks if first else callbacks[::-1]), max_epochs=4)
        trainer.fit(other, data(), data(), ckpt_path=tmp_path / "c" / "last.ckpt")
        assert all(torch.equal(other.state_dict()[key], value) for key, value in base.items())

    # It warns of sharded layers wherever the hook is overridden: https://github.com/Lightning-AI/pytorch-lightning/pull/20545
    @pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
    @pytest.mark.parametrize("first", [True, False])
    def test_layers_that_configure_model_makes_at_each_call_are_adapted_and_averaged(
        self, first: bool, make_trainer: MakeTrainer
    ) -> None:
        class Anew(Two):
            """Makes its layers once for the averages, and once more for the training."""

            def configure_model(self) -> None:
                torch.manual_seed(3)
                self.body, self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3)

        module, callbacks = Anew(), [EMAWeightAveraging(decay=0.3), LoRAFinetuning(rank=2)]
        make_trainer(*(callbacks if first else callbacks[::-1]), max_epochs=2).fit(module, data(), data())
        state = adapter_state_dict(module)
        assert len(state) == 4
        assert all(value.any() for value in state.values())


class TestStochasticWeightAveraging:
    @pytest.mark.parametrize("first", [True, False])
    def test_averages_what_trains_and_leaves_the_base_alone(
        self, first: bool, make_trainer: MakeTrainer, tmp_path: Path
    ) -> None:
        def fit(epochs: int, **arguments: Any) -> tuple[Two, StochasticWeightAveraging]:
            torch.manual_seed(1)
            module = Two()
            module.body.append(nn.BatchNorm1d(8))
            module.body[-1].running_mean.fill_(0.5)
            base = copy.deepcopy(module.state_dict())
            averaging = StochasticWeightAveraging(0.01, swa_epoch_start=1)
            folder = tmp_path / ("resumed" if arguments else "c")
            files = ModelCheckpoint(folder, every_n_epochs=2, save_top_k=-1, filename="{epoch}")
            callbacks = [averaging, LoRAFinetuning(rank=2)] if first else [LoRAFinetuning(rank=2), averaging]
            make_trainer(*callbacks, files, max_epochs=epochs).fit(module, data(), data(), **arguments)
            assert all(torch.equal(module.state_dict()[key], value) for key, value in base.items())
            return module, averaging

        module, averaging = fit(4)
        averaged = adapter_state_dict(averaging._average_model)
        assert all(torch.equal(averaged[key], value) for key, value in adapter_state_dict(module).items())
        assert averaging.n_averaged == 4
        content = torch.load(tmp_path / "c" / "epoch=1.ckpt", weights_only=True)
        state = content["callbacks"]["StochasticWeightAveraging"]["average_model_state"]
        assert set(state) == set(content["state_dict"]) == set(adapter_state_dict(module))
        resumed, _ = fit(4, ckpt_path=tmp_path / "c" / "epoch=1.ckpt")
        assert all(
            torch.equal(adapter_state_dict(resumed)[key], value) for key, value in adapter_state_dict(module).items()
        )


def fit_a_copy(
    base: Any,
    kind: str,
    key: str,
    make_trainer: MakeTrainer,
    caplog: pytest.LogCaptureFixture,
    folder: Path,
    epochs: int,
    ckpt_path: Path | None = None,
) -> Any:
    """Train a copy of a module whose own code updates the tensor `key`.

    The warning and the last line have to name it.
    """
    caplog.clear()
    module = copy.deepcopy(base)
    torch.manual_seed(3)
    trainer = make_trainer(LoRAFinetuning(rank=2), ModelCheckpoint(folder), max_epochs=epochs)
    with (
        caplog.at_level("INFO"),
        pytest.warns(UserWarning, match=f"{kind.capitalize()} of the base changed during training: {key!r}"),
    ):
        trainer.fit(module, data(), ckpt_path=ckpt_path)
    assert f"bitwise unchanged, but for {kind} that the model's own code changes: {key!r}" in caplog.text
    return module


class Centre(Two):
    """Keeps a running centre, as DINO's teacher does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self(batch[0])
        self.centre += 0.1 * logits.detach().mean(0)
        return nn.functional.cross_entropy(logits - self.centre, batch[1])


class TestBuffersThatTheModelChanges:
    def test_are_named_after_the_first_epoch_and_resumed(
        self, make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        fit = partial(fit_a_copy, Centre(), "buffers", "centre", make_trainer, caplog)
        whole = fit(tmp_path / "whole", 4)
        fit(tmp_path / "half", 2)
        resumed = fit(tmp_path / "resumed", 4, newest_checkpoint(tmp_path / "half"))
        assert whole.centre.any()
        assert same(dict(resumed.state_dict()), dict(whole.state_dict()))

    def test_a_parameter_that_changes_is_named_and_the_adapter_is_saved(
        self, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Leaky(Two):
            def on_train_epoch_end(self) -> None:
                self.head.bias.data += 1

        callback = LoRAFinetuning(rank=2)
        with pytest.raises(RuntimeError, match=r"base changed during training: 'head.bias'\."), caplog.at_level("INFO"):
            make_trainer(callback, max_epochs=1).fit(Leaky(), data())
        assert f"Adapters written: {callback.adapter_folder}." in caplog.text
        assert (Path(callback.adapter_folder) / "adapter_config.json").is_file()


class Teacher(Two):
    """Has a frozen teacher that follows its student by a moving average, as BYOL, MoCo and mean teachers have."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).requires_grad_(False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + (self.body(batch[0]) - self.teacher(batch[0])).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        for value, student in zip(self.teacher.parameters(), self.body.parameters(), strict=True):
            value.data = 0.9 * value.data + 0.1 * student.data


class TestAFrozenTeacherThatFollowsItsStudent:
    def test_is_named_and_resumed_and_its_run_ends_well(
        self, make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        base = Teacher()
        fit = partial(fit_a_copy, base, "parameters", "teacher.0.weight", make_trainer, caplog)
        whole = fit(tmp_path / "whole", 3)
        fit(tmp_path / "one", 1)
        fit(tmp_path / "two", 2, newest_checkpoint(tmp_path / "one"))
        resumed = fit(tmp_path / "resumed", 3, newest_checkpoint(tmp_path / "two"))
        assert not torch.allclose(whole.teacher[0].weight, base.teacher[0].weight)
        assert same(dict(resumed.state_dict()), dict(whole.state_dict()))
        saved = torch.load(newest_checkpoint(tmp_path / "two"), weights_only=True)["state_dict"]
        assert {key for key in saved if "lora_" not in key} == {"teacher.0.weight", "teacher.0.bias"}

    def test_is_tested_as_it_was_trained(self, make_trainer: MakeTrainer, tmp_path: Path) -> None:
        base, trained = Teacher(), ModelCheckpoint(tmp_path / "c")
        module, trainer = copy.deepcopy(base), make_trainer(LoRAFinetuning(rank=2), trained, max_epochs=1)
        with pytest.warns(UserWarning, match="Parameters of the base changed"):
            trainer.fit(module, data())
        trainer.test(module, data(), verbose=False)
        trainer.save_checkpoint(tmp_path / "after_test.ckpt")
        for path in (trained.best_model_path, tmp_path / "after_test.ckpt"):
            again = copy.deepcopy(base)
            make_trainer(LoRAFinetuning(rank=2)).test(again, data(), ckpt_path=path, verbose=False)
            assert same(dict(again.state_dict()), dict(module.state_dict()))


class TestCheckpointFiles:
    def test_are_written_in_the_background(self, make_trainer: MakeTrainer, tmp_path: Path) -> None:
        module, files = Two(), ModelCheckpoint(tmp_path / "c", save_last=True)
        make_trainer(LoRAFinetuning(rank=2), files, max_epochs=2, plugins=[AsyncCheckpointIO()]).fit(module, data())
        content = torch.load(tmp_path / "c" / "last.ckpt", weights_only=True)
        assert same(content["state_dict"], {key: value.clone() for key, value in adapter_state_dict(module).items()})
        assert not list((tmp_path / "c").glob(".*"))

    def test_a_path_among_the_hyperparameters_is_read(self, make_trainer: MakeTrainer, tmp_path: Path) -> None:
        class WithPath(Two):
            def __init__(self, folder: Path) -> None:
                super().__init__()
                self.save_hyperparameters()

        base, files = WithPath(tmp_path), ModelCheckpoint(tmp_path / "c", save_last=True)
        make_trainer(LoRAFinetuning(rank=2), files, max_epochs=1).fit(copy.deepcopy(base), data())
        path = tmp_path / "c" / "last.ckpt"
        make_trainer(LoRAFinetuning(rank=2)).test(base, data(), ckpt_path=path, verbose=False)

    def test_another_object_among_them_is_named(self, make_trainer: MakeTrainer, tmp_path: Path) -> None:
        class WithObject(Two):
            def __init__(self, mode: object) -> None:
                super().__init__()
                self.save_hyperparameters()

        base = WithObject(Output(None))
        files = ModelCheckpoint(tmp_path / "c", save_last=True)
        make_trainer(LoRAFinetuning(rank=2), files, max_epochs=1).fit(copy.deepcopy(base), data())
        trainer = make_trainer(LoRAFinetuning(rank=2))
        with pytest.raises(ValueError, match=r"last.ckpt refers to \S*Output, which is not read with weights_only"):
            trainer.test(base, data(), ckpt_path=tmp_path / "c" / "last.ckpt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_network_that_is_compiled_in_init(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    torch.compiler.reset()

    class Compiled(Two):
        def __init__(self) -> None:
            super().__init__()
            net = nn.Sequential(self.body, self.head)
            del self.body, self.head
            self.net = torch.compile(net, backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    base, files = Compiled(), ModelCheckpoint(tmp_path / "c", save_last=True)
    module = Compiled()
    module.load_state_dict(base.state_dict())
    callback = LoRAFinetuning(rank=2)
    make_trainer(callback, files, max_epochs=2).fit(module, data())
    assert all(value.any() for value in adapter_state_dict(module).values())
    trainer = make_trainer(LoRAFinetuning(rank=2))
    tested = trainer.test(base, data(), ckpt_path=tmp_path / "c" / "last.ckpt", verbose=False)
    assert tested == make_trainer().test(module, data(), verbose=False)
    names = json.loads((Path(callback.adapter_folder) / "adapter_config.json").read_text())["target_modules"]
    assert names == ["0.0", "1"]


def test_validation_that_draws_random_numbers_does_not_change_training(make_trainer: MakeTrainer) -> None:
    class Drawing(Two):
        def __init__(self, draws: bool) -> None:
            super().__init__()
            self.draws = draws
            self.body.append(nn.Dropout(0.5))

        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            if self.draws:
                torch.rand(7)

    states = []
    for draws in (False, True):
        torch.manual_seed(0)
        module = Drawing(draws)
        make_trainer(LoRAFinetuning(rank=2), max_epochs=3, num_sanity_val_steps=0).fit(module, data(), data())
        states.append({key: value.clone() for key, value in adapter_state_dict(module).items()})
    assert same(*states)


def test_a_checkpoint_of_adapters_that_are_not_finite_is_not_written(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = Two()
    trainer = make_trainer(LoRAFinetuning(rank=2), max_epochs=1)
    trainer.fit(module, data())
    with torch.no_grad():
        module.head.lora_weight.default.lora_B[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"x.ckpt is not written: 'head.lora_weight.default.lora_B' contain"):
        trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert not (tmp_path / "x.ckpt").exists()


def test_a_strategy_that_replaces_parameters_is_refused_with_the_one_to_use(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(LoRAFinetuning(rank=2), max_epochs=1)
    object.__setattr__(trainer.strategy, "__class__", FSDPStrategy)  # a trainer takes it on GPUs alone
    with pytest.raises(ValueError, match=r"FSDPStrategy replaces the parameters .* Use ModelParallelStrategy"):
        LoRAFinetuning(rank=2).setup(trainer, Two(), "fit")


class Four(pl.LightningModule):
    """Four children, manual optimization, dict batches, steps that return nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.left, self.right, self.both, self.head = (nn.Linear(a, b) for a, b in ((4, 8), (4, 8), (8, 8), (8, 3)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.both(self.left(x[:, :4]) + self.right(x[:, 4:])).relu())}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch["x"])["logits"], batch["y"]))
        optimizer.step()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self(batch["x"])["logits"], batch["y"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


def test_four_children_manual_optimization_and_dict_batches(make_trainer: MakeTrainer) -> None:
    x = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    batches = [{"x": rows, "y": rows.argmax(1) % 3} for rows in x.split(8)]
    loader = DataLoader(batches, batch_size=None)

    def run(epochs: int, ckpt_path: Any = None) -> tuple[Four, Trainer, ConfusionReport]:
        torch.manual_seed(4)
        module, report = Four(), ConfusionReport(verbose=False)
        trainer = make_trainer(LoRAFinetuning(rank=2), report, max_epochs=epochs)
        trainer.fit(module, loader, ckpt_path=ckpt_path)
        return module, trainer, report

    module, trainer, report = run(8)
    trainer.test(module, loader, verbose=False)
    torch.manual_seed(4)
    before, after = (torch.bincount(each(x)["logits"].argmax(1), minlength=3) for each in (Four(), module))
    assert torch.equal(report.report.base.matrix.sum(0), before)
    assert torch.equal(report.report.adapted.matrix.sum(0), after)
    assert report.report.adapted.accuracy > report.report.base.accuracy
    _, stopped, _ = run(4)
    resumed, _, _ = run(8, stopped.checkpoint_callback.best_model_path)
    assert same(dict(resumed.state_dict()), dict(module.state_dict()))


@pytest.mark.parametrize(
    ("hook", "kind"),
    [
        ("__init__", "Int8WeightOnlyConfig"),
        ("setup", "Int8WeightOnlyConfig"),
        ("configure_model", "Int8WeightOnlyConfig"),
        ("setup", "Float8WeightOnlyConfig"),
        ("configure_model", "IntxWeightOnlyConfig"),  # of four bits
    ],
)
def test_a_base_that_is_quantized_anywhere_before_trains_and_resumes(
    make_trainer: MakeTrainer, hook: str, kind: str
) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="the extra torchao is not installed")
    bits = {"weight_dtype": torch.int4} if kind.startswith("Intx") else {}

    class Quantized(Later):
        def __init__(self) -> None:
            super().__init__(hook if hook != "__init__" else "", all_layers=hook != "__init__")
            if hook == "__init__":
                self.make()

        def make(self) -> None:
            super().make()
            if type(self.head.weight) is nn.Parameter:
                torchao.quantize_(self, getattr(torchao, kind)(**bits))

    def run(epochs: int, ckpt_path: Any = None) -> tuple[Quantized, Trainer]:
        module = Quantized()
        trainer = make_trainer(LoRAFinetuning(rank=2), max_epochs=epochs)
        trainer.fit(module, data(), ckpt_path=ckpt_path)
        return module, trainer

    module, trainer = run(4)
    assert Path(trainer.checkpoint_callback.best_model_path).stat().st_size < 60_000
    _, stopped = run(2)
    resumed, _ = run(4, stopped.checkpoint_callback.best_model_path)
    assert all(value.any() for value in adapter_state_dict(module).values())
    assert same(adapter_state_dict(resumed), adapter_state_dict(module))
    with pytest.warns(UserWarning, match="were quantized and are dense after merging"):
        merge(module)
