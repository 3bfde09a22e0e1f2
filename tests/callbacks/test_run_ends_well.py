"""What a run leaves behind, whatever else happens: the adapters of the best epoch, from memory."""

from __future__ import annotations

import functools
import importlib
import pickle
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lora_lightning import LoRAConfig, LoRAFinetuning, load_adapter
from lora_lightning.callbacks.adapter_writer import AdapterWriter
from lora_lightning.callbacks.base_of_run import is_as_created
from lora_lightning.checkpoints import NotFiniteError
from lora_lightning.checkpoints.atomic_checkpoint import write_atomically
from lora_lightning.lora import (
    adapter_names,
    adapter_state_dict,
    attach,
    backbone_of,
    base_fingerprint,
    detach,
    fingerprint,
    is_adapted,
    merge,
)
from tests.conftest import ROOT

pytestmark = pytest.mark.filterwarnings(
    # Small data in the process of the test: https://github.com/Lightning-AI/pytorch-lightning/issues/19223
    "ignore:.*does not have many workers.*",
    "ignore:The number of training batches",
    # The Trainer's own: https://github.com/Lightning-AI/pytorch-lightning/issues/15340
    "ignore:Checkpoint directory .* exists and is not empty",
)


def loader() -> DataLoader[Any]:
    x = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.argmax(1) % 3), batch_size=8, generator=torch.Generator())


class Module(LightningModule):
    """Two layers, whose validation score is given for each epoch: the lowest is the best."""

    def __init__(self, scores: tuple[float, ...] = (1.0, 0.5, 2.0), extra: object = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.save_hyperparameters()
        self.encoder, self.decoder = nn.Linear(8, 8), nn.Linear(8, 3)
        self.scores = scores
        self.seen: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x).relu())

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("score", self.scores[self.current_epoch])

    def on_validation_end(self) -> None:
        state = nn.Module.state_dict(self)
        self.seen.append({key: value.clone() for key, value in state.items() if "lora_" in key})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)


class Filtered(Module):
    """Leaves its encoder out of checkpoints, as an answer in Lightning's issue 19514 says."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False

    def state_dict(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        state = super().state_dict(*arguments, **keywords)
        return {key: value for key, value in state.items() if not key.startswith("encoder")}


def fit(
    module: LightningModule, folder: Path, *callbacks: Callback, epochs: int = 3, **options: Any
) -> tuple[Trainer, LoRAFinetuning]:
    torch.manual_seed(2)
    ours = LoRAFinetuning(rank=2)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=CSVLogger(folder),
        callbacks=[ours, *callbacks],
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(), loader(), **options)
    return trainer, ours


def in_folder(folder: object) -> dict[str, Tensor]:
    found = load_file(Path(str(folder)) / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model.").removesuffix(".weight"): value for key, value in found.items()}


def of_epoch(module: Module, epoch: int) -> dict[str, Tensor]:
    return {key.replace(".lora_weight.default.", "."): value for key, value in module.seen[epoch].items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_folder_holds_the_averages_of_the_best_checkpoint(tmp_path: Path) -> None:
    files = ModelCheckpoint(tmp_path / "files", monitor="score")
    _, ours = fit(Module(), tmp_path, EMAWeightAveraging(decay=0.5), files)
    checkpoint = torch.load(files.best_model_path, weights_only=True)
    saved = {key.replace(".lora_weight.default.", "."): value for key, value in checkpoint["state_dict"].items()}
    assert checkpoint["epoch"] == 1
    assert equal(in_folder(ours.adapter_folder), {key: value for key, value in saved.items() if "lora_" in key})


@pytest.mark.parametrize("weights_only", [False, True], ids=["full", "weights only"])
def test_the_folder_holds_the_best_epoch_and_another_lies_beside_its_checkpoint(
    weights_only: bool, tmp_path: Path
) -> None:
    module = Module()
    files = ModelCheckpoint(tmp_path / "c", monitor="score", save_weights_only=weights_only)
    _, ours = fit(module, tmp_path, files)
    assert equal(in_folder(ours.adapter_folder), of_epoch(module, 1))
    (beside,) = (tmp_path / "c").glob("*.adapter")  # that of the first epoch went with its checkpoint
    assert beside.stem == Path(files.best_model_path).stem
    assert equal(in_folder(beside), of_epoch(module, 1))


def test_a_checkpoint_with_any_objects_does_not_end_a_run(tmp_path: Path) -> None:
    module = Module(extra=[functools.partial(torch.optim.SGD, lr=0.1), nn.Linear(2, 2), Module])
    _, ours = fit(module, tmp_path, ModelCheckpoint(tmp_path / "c", monitor="score"))
    assert equal(in_folder(ours.adapter_folder), of_epoch(module, 1))


def test_a_module_that_filters_its_state_gets_the_adapters_of_one_epoch_and_resumes_with_all(tmp_path: Path) -> None:
    whole, half, resumed = Filtered(), Filtered(), Filtered()
    _, ours = fit(whole, tmp_path / "a", ModelCheckpoint(tmp_path / "a", monitor="score"))
    assert equal(in_folder(ours.adapter_folder), of_epoch(whole, 1))
    fit(half, tmp_path / "b", ModelCheckpoint(tmp_path / "b", save_last=True), epochs=2)
    fit(resumed, tmp_path / "c", epochs=3, ckpt_path=str(tmp_path / "b" / "last.ckpt"))
    assert equal(nn.Module.state_dict(resumed), nn.Module.state_dict(whole))


def test_a_best_checkpoint_that_is_gone_is_not_needed(tmp_path: Path) -> None:
    class Removes(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            for path in (tmp_path / "c").rglob("*.ckpt"):
                path.unlink()

    module = Module()
    _, ours = fit(module, tmp_path, ModelCheckpoint(tmp_path / "c", monitor="score"), Removes())
    assert equal(in_folder(ours.adapter_folder), of_epoch(module, 1))


@pytest.mark.parametrize(("resumed_scores", "best"), [((9.0, 1.0, 2.0), 0), ((9.0, 1.0, 0.25), 2)])
def test_a_resumed_run_knows_the_best_epoch_of_before(
    resumed_scores: tuple[float, ...], best: int, tmp_path: Path
) -> None:
    first, second = Module((0.5, 1.0, 2.0)), Module(resumed_scores)
    before = ModelCheckpoint(tmp_path / "a", monitor="score", save_last=True)
    fit(first, tmp_path / "a", before, epochs=2)
    path, last = before.best_model_path, str(tmp_path / "a" / "last.ckpt")
    # Lightning forgets the score of a run that saves its checkpoints elsewhere.
    files = ModelCheckpoint(tmp_path / "b", monitor="score")
    _, ours = fit(second, tmp_path / "b", files, ckpt_path=last)
    assert files.best_model_score == min(0.5, *resumed_scores[2:])
    assert (files.best_model_path == path) == (best == 0)
    assert Path(path).is_file()  # it is in the folder of another run
    assert equal(in_folder(ours.adapter_folder), of_epoch(first, 0) if best == 0 else of_epoch(second, -1))


def test_a_best_checkpoint_that_is_gone_is_forgotten_by_a_run_in_a_new_folder(tmp_path: Path) -> None:
    first, second = Module((0.5, 1.0, 2.0)), Module((9.0, 1.0, 2.0))
    before = ModelCheckpoint(tmp_path / "a", monitor="score", save_last=True)
    fit(first, tmp_path / "a", before, epochs=2)
    Path(before.best_model_path).unlink()
    files = ModelCheckpoint(tmp_path / "b", monitor="score")
    with pytest.warns(UserWarning, match="dirpath has changed"):
        _, ours = fit(second, tmp_path / "b", files, ckpt_path=str(tmp_path / "a" / "last.ckpt"))
    assert files.best_model_score > 0.5
    assert equal(in_folder(ours.adapter_folder), of_epoch(first, 0))  # which lay beside it


@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end"])
def test_a_callback_that_fails_afterwards_does_not_cost_the_result(hook: str, tmp_path: Path) -> None:
    class Fails(Callback):
        def fail(self, trainer: Trainer, pl_module: LightningModule) -> None:
            raise RuntimeError("no space for a figure")

    failing = Fails()
    setattr(failing, hook, failing.fail)
    module, ours = Module(), LoRAFinetuning(rank=2)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(tmp_path),
        callbacks=[failing, ours],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    with pytest.raises(RuntimeError, match="no space for a figure"):
        trainer.fit(module, loader(), loader())
    (folder,) = tmp_path.rglob("adapter")
    assert equal(in_folder(folder), of_epoch(module, -1))
    pickle.dumps(ours)


def test_the_class_in_place_of_an_object_is_told_apart() -> None:
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=[LoRAFinetuning])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"has the class; expected an object: LoRAFinetuning\(rank=4\)\.$") as failure:
        trainer.fit(Module(), loader(), loader())
    assert failure.value.__context__ is None


def test_a_full_disk_does_not_hide_why_a_run_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            raise RuntimeError("no figure")

    def write(self: AdapterWriter, trainer: Trainer) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(AdapterWriter, "_write", write)
    module, ours = Module(), LoRAFinetuning(rank=2)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=CSVLogger(tmp_path), callbacks=[Fails(), ours],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="no figure") as failure:
        trainer.fit(module, loader(), loader())
    assert failure.value.__notes__ == ["The adapters could not be written: no space left on device"]
    pickle.dumps(ours)


class Stops(Module):
    """Fails in its first step."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        raise KeyError("a mistake of the user")


def test_after_an_exception_the_module_and_the_callback_are_as_before(tmp_path: Path) -> None:
    module, ours = Stops(), LoRAFinetuning(rank=2)
    attributes = set(vars(module))
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[ours], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(KeyError, match="a mistake of the user"):
        trainer.fit(module, loader(), loader())
    assert {"configure_model", "setup", "forward"}.isdisjoint(set(vars(module)) - attributes)
    pickle.dumps(ours)


def test_a_module_trained_in_full_that_becomes_nan_keeps_the_last_finite_checkpoint(tmp_path: Path) -> None:
    class Diverges(Module):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss, weight = super().training_step(batch, index), self.decoder.weight
            # This adds zero, with a gradient of NaN.
            return loss + (weight - weight.detach()).square().sum().sqrt() if self.global_step == 4 else loss

    trainer = Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            LoRAFinetuning(rank=2, target_modules=["encoder"], modules_to_save=["decoder"]),
            ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="{step}"),
        ],
    )  # fmt: skip
    with pytest.raises(NotFiniteError, match=r"'decoder.weight'.* contain NaN or infinity"):
        trainer.fit(Diverges((1.0,) * 9), loader(), loader())
    (kept,) = tmp_path.glob("*.ckpt")
    saved = torch.load(kept, weights_only=True)["state_dict"]
    assert all(bool(value.isfinite().all()) for value in saved.values())


class Counts(nn.Module):
    """Keeps a number in the state dict that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(())

    def get_extra_state(self) -> Tensor:
        return self.seen

    def set_extra_state(self, state: Tensor) -> None:
        self.seen = state

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return x


def test_states_of_metrics_and_extra_states_are_no_part_of_the_frozen_base(tmp_path: Path) -> None:
    class Measured(Module):
        def __init__(self) -> None:
            super().__init__()
            self.accuracy, self.counts = MulticlassAccuracy(3), Counts()
            self.accuracy.persistent(True)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            logits = self.counts(self(batch[0]))
            self.accuracy(logits, batch[1])
            return nn.functional.cross_entropy(logits, batch[1])

    before = base_fingerprint(Measured())
    module = Measured()
    fit(module, tmp_path, ModelCheckpoint(tmp_path / "c", save_last=True), epochs=2)
    assert module.counts.seen > 0
    assert base_fingerprint(module) == before
    fit(Measured(), tmp_path, epochs=3, ckpt_path=str(tmp_path / "c" / "last.ckpt"))


def leave_a_trace(path: str) -> None:
    Path(path).touch()


class Trap:
    """Would leave a file if it were made from a checkpoint."""

    def __reduce__(self) -> Any:
        return leave_a_trace, ("trapped",)


def test_a_base_with_objects_and_a_bare_state_dict_are_read_and_no_code_in_them_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain, path = Module(extra=functools.partial(torch.optim.SGD, lr=0.1)), tmp_path / "base.ckpt"
    with torch.no_grad():
        plain.encoder.weight.fill_(0.25)
    trainer = Trainer(max_epochs=0, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.strategy.connect(plain)
    trainer.save_checkpoint(path)
    torch.save(plain.state_dict(), tmp_path / "bare.pt")

    def start(**options: Any) -> Module:
        module = Module()
        Trainer(
            max_epochs=1, limit_train_batches=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[LoRAFinetuning(rank=2, **options)],
        ).fit(module, loader(), loader())  # fmt: skip
        return module

    torch.save({"state_dict": plain.state_dict(), "object": Trap()}, tmp_path / "trap.ckpt")
    with pytest.raises(ValueError, match=r"functools.partial.* pass weights_only=False to fit, test or LoRAFinetuning"):
        start(base_checkpoint=path, weights_only=True)
    for name in ("base.ckpt", "trap.ckpt", "bare.pt"):
        module = start(base_checkpoint=tmp_path / name)
        assert torch.equal(module.encoder._parameters["weight"], plain.encoder.weight)
    assert not Path("trapped").exists()
    module = start(base_checkpoint=path, weights_only=False)
    assert torch.equal(module.decoder._parameters["weight"], plain.decoder.weight)


@pytest.mark.parametrize("place", ["disk", "url"])
def test_objects_in_a_checkpoint_are_made_only_if_the_user_trusts_it(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / "trap.ckpt") if place == "disk" else "memory://trap.ckpt"
    with fsspec.open(path, "wb") as file:
        torch.save({"state_dict": {}, "object": Trap()}, file)
    files = write_atomically(TorchCheckpointIO())
    with pytest.raises(ValueError, match="pass weights_only=False to fit, test or LoRAFinetuning"):
        files.load_checkpoint(path)
    assert not Path("trapped").exists()
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.warns(UserWarning, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD detected"):
        files.load_checkpoint(path)
    assert Path("trapped").exists()


@pytest.mark.parametrize("source", ["log folder", "checkpoint", "adapter folder"])
def test_a_run_s_adapters_are_attached_without_a_trainer(source: str, tmp_path: Path) -> None:
    module = Module()
    trainer, ours = fit(module, tmp_path, epochs=1)
    files = trainer.checkpoint_callback
    sources = {"log folder": tmp_path, "checkpoint": files.best_model_path, "adapter folder": ours.adapter_folder}
    other, x = Module(), torch.randn(4, 8)
    assert load_adapter(other, sources[source], name="again") == ["encoder", "decoder"]
    assert adapter_names(other) == ["again"]
    assert torch.equal(other(x), module(x))


def test_a_checkpoint_without_adapters_or_of_another_base_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    module = Module()
    trainer, _ = fit(module, tmp_path, epochs=1)
    other = Module()
    torch.nn.init.zeros_(other.encoder.weight)
    path = trainer.checkpoint_callback.best_model_path
    with pytest.raises(ValueError, match="were trained on another base"):
        load_adapter(other, path, strict=True)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="contains no adapters: it is a full checkpoint"):
        load_adapter(other, tmp_path / "plain.ckpt")
    assert adapter_state_dict(other) == {}
    with pytest.warns(UserWarning, match="were trained on another base"):
        load_adapter(other, path)


def test_containers_of_omegaconf_none_and_a_whole_configuration_are_arguments() -> None:
    config = OmegaConf.create(
        {"target_modules": ["encoder"], "rank_pattern": {"encoder": 3}, "modules_to_save": None, "bypass": [8, 3]}
    )
    expected = LoRAConfig(target_modules=["encoder"], rank_pattern={"encoder": 3}, bypass=(8, 3))
    made: list[Callable[[], LoRAFinetuning]] = [
        lambda: LoRAFinetuning(**config),
        lambda: LoRAFinetuning(config),
        lambda: LoRAFinetuning(expected),
        lambda: LoRAFinetuning(LoRAConfig(rank=5), rank=8, **config),
    ]
    for make in made:
        assert make().config == expected
        pickle.dumps(make())


@pytest.mark.parametrize(
    ("name", "meant"), [("r", "rank"), ("lora_alpha", "alpha"), ("target_module", "target_modules")]
)
def test_an_argument_of_another_library_or_a_misspelt_one_is_answered_with_the_right_one(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"has no argument '{name}'. Is '{meant}' meant"):
        LoRAFinetuning(**{name: 4})


def test_something_else_as_the_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LoRAFinetuning\(4\): expected a LoRAConfig or its arguments by name"):
        LoRAFinetuning(4)


QUESTION = "is an untrained base meant?"


def test_a_base_with_weights_as_created_is_asked_about_before_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        trainer, _ = fit(Module(), tmp_path / "a", epochs=1)
        assert caplog.text.count(QUESTION) == 1
        trainer.predict(Module(), [torch.randn(2, 8)])
        trained = Module()
        with torch.no_grad():
            trained.decoder.weight += 0.5
        fit(trained, tmp_path / "b", epochs=1)
    assert caplog.text.count(QUESTION) == 1


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([nn.Conv2d(3, 8, 3), nn.Linear(8, 2)], True),
        ([nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)], True),
        ([nn.Embedding(4, 8)], False),
    ],
)
def test_only_what_pytorch_initializes_is_taken_for_untrained(layers: list[nn.Module], expected: bool) -> None:
    network = nn.Sequential(*layers)
    assert is_as_created(network) == expected
    if len(layers) == 2:
        for value in (layers[1].running_mean if len(layers[1]._buffers) else layers[1].weight.detach(),):
            value += 1.0
        assert not is_as_created(network)
    assert is_as_created(network.half()) == is_as_created(network.float())


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_dropout_in_a_network_in_evaluation_mode_is_said_once(tmp_path: Path) -> None:
    module = Module()
    module.encoder.eval()
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, callbacks=[LoRAFinetuning(rank=2, dropout=0.1)],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="The dropout of LoRAConfig never acts in 'encoder': .* evaluation") as said:
        trainer.fit(module, loader(), loader())
    assert sum("dropout" in str(each.message) for each in said) == 1


def test_a_folder_that_peft_refuses_is_said_at_the_end_of_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Dilated(Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 2, 3, dilation=2), nn.Flatten())

    with caplog.at_level("INFO"):
        fit(Module(), tmp_path / "a", epochs=1)
        assert "PEFT refuses" not in caplog.text
        _, ours = fit(Dilated(), tmp_path / "b", epochs=1)
    assert f"Adapters written: {ours.adapter_folder}. PEFT refuses this folder, since" in caplog.text
    assert "'encoder.1'" in caplog.text.rpartition("PEFT refuses")[2]


def test_a_library_that_makes_its_optimizer_early_trains_adapters_that_were_attached_before(tmp_path: Path) -> None:
    class Early(Module):
        def __init__(self, attached: bool) -> None:
            super().__init__()
            if attached:
                attach(backbone_of(self), LoRAConfig(rank=2))
            self.optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.optimizer

    with pytest.raises(ValueError, match=r"If a library creates it earlier, call lora.attach\(lora.backbone_of"):
        fit(Early(attached=False), tmp_path / "a", epochs=1)
    module = Early(attached=True)
    fit(module, tmp_path / "b", epochs=1)
    assert all(bool(value.any()) for value in adapter_state_dict(module).values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_base_is_read_once_more_after_attach_however_many_checkpoints_are_the_best_so_far(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[int]()
    hashed = fingerprint._bytes

    def count(value: Tensor) -> Any:
        read.append(value.data_ptr())
        return hashed(value)

    class Floats(Module):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0].to(self.decoder.weight.dtype)).float(), batch[1])

    monkeypatch.setattr(fingerprint, "_bytes", count)
    module, ours = Floats((3.0, 2.0, 1.0)), LoRAFinetuning(rank=2)
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", logger=CSVLogger(tmp_path), precision=precision, num_sanity_val_steps=0,
        callbacks=[ours, ModelCheckpoint(tmp_path / "c", monitor="score")], enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, loader(), loader())
    passes = 2 if precision == "32-true" else 3  # the values were converted after attach
    # In all passes but the last, the digest of each tensor is computed beside that of all.
    assert len(read) == 4 * (2 * passes - 1)
    other = Floats()
    if precision == "32-true":
        load_adapter(other, ours.adapter_folder, strict=True)


@pytest.mark.parametrize("process", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["here", "process"])
def test_the_example_for_hydra_trains_tests_and_resumes(process: bool, tmp_path: Path) -> None:
    script = ROOT / "examples" / "hydra" / "train.py"

    def run(name: str, *words: str) -> Path:
        if process:
            line = [sys.executable, str(script), f"hydra.run.dir={tmp_path / name}", *words]
            done = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)
            assert done.returncode == 0, done.stderr
        else:
            with initialize_config_dir(str(script.parent), version_base=None):
                config = compose("config", [f"trainer.default_root_dir={tmp_path / name}", *words])
            runpy.run_path(str(script))["main"](config)
        (folder,) = (tmp_path / name).rglob("version_0/adapter")
        return folder

    shorter = ["trainer.limit_train_batches=3", "+trainer.limit_val_batches=2", "+trainer.limit_test_batches=2"]
    run("first", "callbacks.lora.rank=1", "trainer.max_epochs=1", *shorter)
    (last,) = (tmp_path / "first").rglob("last.ckpt")
    folder = run("second", "callbacks.lora.rank=1", f"ckpt_path='{last}'", *shorter)
    tensors = in_folder(folder)
    assert tensors["linear1.lora_A"].shape == (1, 784)
    assert tensors["linear2.lora_A"].shape == (4, 1000)


@pytest.mark.parametrize("way", [merge, detach])
def test_a_merged_or_detached_model_stays_so_in_every_later_stage(
    way: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    class Tested(Module):
        def test_step(self, batch: list[Tensor], index: int) -> None:
            self.log("loss", self.training_step(batch, index))

    module = Tested()
    trainer, _ = fit(module, tmp_path, epochs=1)
    x = torch.randn(4, 8)
    way(module)
    expected, plain = module(x), {key: value.clone() for key, value in module.state_dict().items()}
    trainer.test(module, loader(), verbose=False)
    trainer.predict(module, [x])
    assert not is_adapted(module)
    assert torch.equal(module(x), expected)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    saved = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    assert "lora_lightning" not in saved
    assert equal(saved["state_dict"], plain)


class TestFullCheckpoints:
    """`checkpoints="full"`: what a library reads that knows nothing of adapters."""

    def run(
        self, module: Module, folder: Path, epochs: int, ckpt_path: str | None = None, **options: Any
    ) -> tuple[Trainer, str]:
        torch.manual_seed(2)
        files = ModelCheckpoint(folder, save_last=True)
        ours = LoRAFinetuning(rank=2, checkpoints="full", modules_to_save=["decoder"], **options)
        trainer = Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, callbacks=[ours, files], enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
        return trainer, str(folder / "last.ckpt")

    def test_the_plain_class_loads_it_strictly_and_computes_the_same(self, tmp_path: Path) -> None:
        module, x = Module(), torch.randn(4, 8)
        _, path = self.run(module, tmp_path, 2)
        plain = Module.load_from_checkpoint(path)
        assert not is_adapted(plain)
        torch.testing.assert_close(plain(x), module(x))
        other = Module()
        load_adapter(other, path)
        assert torch.equal(other(x), module(x))

    @pytest.mark.parametrize("has_file", [False, True], ids=["base in the checkpoint", "base in a file"])
    def test_a_run_resumes_from_it_bitwise(self, has_file: bool, tmp_path: Path) -> None:
        options = {}
        if has_file:
            torch.save(Module().state_dict(), tmp_path / "base.pt")
            options["base_checkpoint"] = tmp_path / "base.pt"
        whole, half, rest = Module(), Module(), Module()
        self.run(whole, tmp_path / "a", 3, **options)
        _, path = self.run(half, tmp_path / "b", 2, **options)
        assert ("base_weights" in torch.load(path, weights_only=True)["lora_lightning"]) != has_file
        self.run(rest, tmp_path / "c", 3, ckpt_path=path, **options)
        assert equal(dict(rest.state_dict()), dict(whole.state_dict()))

    def test_what_can_not_be_merged_is_refused_before_training(self, tmp_path: Path) -> None:
        module = Module()
        module.tied = nn.Linear(8, 8)
        module.tied.weight = module.encoder.weight
        with pytest.raises(ValueError, match=r"'encoder' \(shared by encoder.weight, tied.weight\).* cannot be merged"):
            self.run(module, tmp_path, 1)
        assert module.seen == []


def test_how_a_library_saves_its_whole_model_is_said_once_where_it_matters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages"
    installed.mkdir()
    (installed / "a_library.py").write_text(f"from {__name__} import Module\nclass Theirs(Module): ...\n")
    monkeypatch.syspath_prepend(installed)
    theirs = importlib.import_module("a_library").Theirs
    advice = (
        "Before a library saves the whole model, call lora.merge, or train with checkpoints='full': its file then has "
        "the keys of the plain model"
    )
    for kind, checkpoints, said in ((theirs, "full", 0), (Module, "adapters", 0), (theirs, "adapters", 1)):
        ours = LoRAFinetuning(rank=2, checkpoints=checkpoints)
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", logger=CSVLogger(tmp_path / kind.__name__ / checkpoints), callbacks=[ours],
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        with caplog.at_level("INFO"):
            trainer.fit(kind(), loader(), loader())
        assert caplog.text.count(advice) == said
