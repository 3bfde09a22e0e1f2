"""`LoRAFinetuning` in real trainings: what it attaches, trains, saves, loads and refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import Classifier, LoRAConfig, LoRAFinetuning, MNISTDataModule, RichBoyNet, load_adapter
from lora_lightning.checkpoints import newest_checkpoint
from lora_lightning.lora import adapter_state_dict, attach, base_fingerprint, is_adapted

MakeTrainer = Callable[..., Trainer]


def model() -> Classifier:
    return Classifier(RichBoyNet(32, 16))


def sample(**arguments: object) -> MNISTDataModule:
    return MNISTDataModule(**({"source": "sample", "batch_size": 100} | arguments))


def adapters(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in adapter_state_dict(module).items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def base(make_trainer: MakeTrainer, tmp_path: Path) -> Path:
    """The folder of a short pretraining."""
    folder = tmp_path / "pretrained"
    make_trainer(ModelCheckpoint(folder), max_steps=10, logger=False).fit(model(), datamodule=sample())
    return folder


def finetune(
    make_trainer: MakeTrainer, base: Path | None, **arguments: Any
) -> tuple[Trainer, Classifier, LoRAFinetuning]:
    callback = LoRAFinetuning(**({"rank": 1, "base_checkpoint": base} | arguments))
    trainer, module = make_trainer(callback, max_epochs=1), model()
    trainer.fit(module, datamodule=sample(digits=[9]))
    return trainer, module, callback


def test_fit_trains_the_adapters_of_the_base_alone(make_trainer: MakeTrainer, base: Path) -> None:
    saved = torch.load(newest_checkpoint(base), weights_only=True)["state_dict"]
    trainer, module, callback = finetune(make_trainer, base)
    live = module.state_dict()
    assert all(torch.equal(live[key], value) for key, value in saved.items())
    assert all(value.any() for value in adapter_state_dict(module).values())
    assert {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]} == {
        id(p) for p in module.parameters() if p.requires_grad
    }
    assert base_fingerprint(module.backbone) == callback.base_fingerprint


def test_a_folder_of_adapters_is_tested_and_trained_further(make_trainer: MakeTrainer, base: Path) -> None:
    trainer, module, callback = finetune(make_trainer, base, rank=2)
    expected = trainer.test(module, datamodule=sample(), verbose=False)
    trained, folder = adapters(module), callback.adapter_folder

    again = model()
    found = make_trainer(LoRAFinetuning(base_checkpoint=base, adapter=folder)).test(again, sample(), verbose=False)
    assert found == [pytest.approx(expected[0])]
    assert equal(adapters(again), trained)

    _, further, _ = finetune(make_trainer, base, adapter=folder)
    assert adapters(further).keys() == trained.keys()
    assert not equal(adapters(further), trained)


def test_it_says_which_layers_and_how_many_parameters(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(LoRAFinetuning(rank=1), fast_dev_run=True)
    with caplog.at_level("INFO"):
        trainer.fit(Classifier(RichBoyNet()), datamodule=sample())
    assert "linear2: 1000 -> 2000, rank 1, scale 1, 3,000 parameters" in caplog.text
    assert "Trained: 6,794 parameters, 0.242% of the 2,807,010 that are frozen." in caplog.text


def test_the_newest_checkpoint_of_a_log_folder_is_the_base_and_is_named(
    make_trainer: MakeTrainer, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        _, _, callback = finetune(make_trainer, base)
    assert callback.base_path == next(base.glob("*.ckpt"))
    assert f"Base: {callback.base_path}" in caplog.text


def test_a_checkpoint_holds_adapters_alone_and_loads_strictly_in_a_new_process(
    make_trainer: MakeTrainer, base: Path
) -> None:
    trainer, module, callback = finetune(make_trainer, base)
    path = trainer.checkpoint_callback.best_model_path
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"backbone.{key}" for key in adapter_state_dict(module.backbone)}
    assert checkpoint["lora_lightning"]["base_fingerprint"] == callback.base_fingerprint
    assert checkpoint["lora_lightning"]["base_path"] == str(callback.base_path)

    for verb in ("test", "validate", "predict"):
        other = model()
        getattr(make_trainer(LoRAFinetuning(rank=1, base_checkpoint=base)), verb)(
            other, datamodule=sample(), ckpt_path=path
        )
        assert equal(adapters(other), adapters(module))
        assert torch.equal(other.backbone.linear1.weight, module.backbone.linear1.weight)


def test_fit_goes_on_from_an_adapter_checkpoint(make_trainer: MakeTrainer, base: Path) -> None:
    trainer, module, _ = finetune(make_trainer, base)
    path = trainer.checkpoint_callback.best_model_path
    resumed, other = make_trainer(LoRAFinetuning(rank=1, base_checkpoint=base), max_epochs=1), model()
    resumed.fit(other, datamodule=sample(digits=[9]), ckpt_path=path)
    assert resumed.global_step == 3
    assert equal(adapters(other), adapters(module))
    more = make_trainer(LoRAFinetuning(rank=1, base_checkpoint=base), max_epochs=2)
    more.fit(other := model(), datamodule=sample(digits=[9]), ckpt_path=path)
    assert more.global_step == 6
    assert not equal(adapters(other), adapters(module))


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_checkpoint_saved_by_hand_is_filtered_too(
    make_trainer: MakeTrainer, base: Path, tmp_path: Path, weights_only: bool
) -> None:
    trainer, module, _ = finetune(make_trainer, base)
    trainer.save_checkpoint(tmp_path / "hand.ckpt", weights_only=weights_only)
    assert set(torch.load(tmp_path / "hand.ckpt", weights_only=True)["state_dict"]) == set(adapter_state_dict(module))
    other = model()
    make_trainer(LoRAFinetuning(rank=1, base_checkpoint=base)).test(
        other, datamodule=sample(), ckpt_path=tmp_path / "hand.ckpt", verbose=False
    )
    assert equal(adapters(other), adapters(module))


def test_the_adapter_folder_serves_the_bare_backbone(make_trainer: MakeTrainer, base: Path) -> None:
    _, module, callback = finetune(make_trainer, base)
    assert callback.adapter_folder is not None
    assert callback.adapter_folder.name == "adapter"
    bare = RichBoyNet(32, 16)
    saved = torch.load(newest_checkpoint(base), weights_only=True)["state_dict"]
    bare.load_state_dict({key.removeprefix("backbone."): value for key, value in saved.items()})
    load_adapter(bare, callback.adapter_folder)
    images = torch.randn(3, 784)
    assert torch.equal(bare(images), module(images))


def test_fit_then_test_adapts_once(make_trainer: MakeTrainer) -> None:
    callback, module = LoRAFinetuning(rank=1), model()
    trainer = make_trainer(callback, max_steps=2)
    trainer.fit(module, datamodule=sample())
    trained = adapters(module)
    trainer.test(module, datamodule=sample(), verbose=False)
    assert equal(adapters(module), trained)


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty")
def test_a_second_fit_into_one_folder_overwrites_no_adapter(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    folders = []
    for _ in range(2):
        callback = LoRAFinetuning(rank=1)
        logger = pl.loggers.CSVLogger(tmp_path, name="same", version=0)
        trainer = make_trainer(callback, max_steps=1, logger=logger, enable_checkpointing=False)
        trainer.fit(model(), datamodule=sample())
        folders.append(callback.adapter_folder.name)
    assert folders == ["adapter", "adapter-v1"]


class OwnModule(pl.LightningModule):
    """A user's own module: layers beside one another, a norm layer, an optimizer over everything."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.head = nn.Linear(16, 3)
        self.register_buffer("seen", torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(20, 8), torch.arange(20) % 3), batch_size=5)


# Lightning notices the frozen norm layer; it is meant.
@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode at the start of training")
def test_any_module_is_adapted_whole_and_its_norms_do_not_drift(make_trainer: MakeTrainer) -> None:
    module, callback = OwnModule(), LoRAFinetuning(rank=2)
    before = copy.deepcopy(module.state_dict())
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(module)
    assert callback.adapted is module
    assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())
    assert all(value.any() for value in adapter_state_dict(module).values())
    assert set(torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]) == set(
        adapter_state_dict(module)
    )


def test_a_base_that_something_changes_is_an_error(make_trainer: MakeTrainer) -> None:
    class Meddling(Classifier):
        def on_train_batch_end(self, *_: Any) -> None:
            self.backbone.linear1.bias.data += 1

    with pytest.raises(RuntimeError, match="The frozen base changed during training"):
        make_trainer(LoRAFinetuning(rank=1), max_steps=1).fit(Meddling(RichBoyNet(4, 4)), datamodule=sample())


def test_writes_to_the_base_are_reported_after_the_epoch_and_may_be_undone(make_trainer: MakeTrainer) -> None:
    class Meddling(Classifier):
        restores = False

        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                self.backbone.linear1.bias.add_(1)

        def on_train_epoch_end(self) -> None:
            if self.restores:
                with torch.no_grad():
                    self.backbone.linear1.bias.copy_(bias)

    module = Meddling(RichBoyNet(4, 4))
    bias = module.backbone.linear1.bias.detach().clone()
    trainer = make_trainer(LoRAFinetuning(rank=1), max_epochs=2)
    with (
        pytest.warns(UserWarning, match=r"The frozen base has changed: 'linear1\.bias'"),
        pytest.raises(RuntimeError, match="The frozen base changed during training"),
    ):
        trainer.fit(module, datamodule=sample())

    module = Meddling(RichBoyNet(4, 4))
    bias, module.restores = module.backbone.linear1.bias.detach().clone(), True
    with pytest.warns(UserWarning, match="The frozen base has changed") as caught:
        make_trainer(LoRAFinetuning(rank=1), max_epochs=2).fit(module, datamodule=sample())
    assert len([each for each in caught if "frozen base" in str(each.message)]) == 1


class TestRefusals:
    """Each message names both sides and what to do; the model is left as it was."""

    def refuse(self, trainer: Trainer, message: str, kind: type[Exception] = ValueError, **arguments: Any) -> None:
        module = arguments.pop("module", None) or model()
        with pytest.raises(kind, match=message):
            trainer.fit(module, datamodule=sample(), **arguments)

    def test_a_base_checkpoint_that_is_not_there(self, make_trainer: MakeTrainer, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for name, message in {"no": "no does not exist; expected", "empty": "empty contains no checkpoint"}.items():
            trainer = make_trainer(LoRAFinetuning(base_checkpoint=tmp_path / name))
            self.refuse(trainer, message, FileNotFoundError)

    def test_a_base_of_another_shape(self, make_trainer: MakeTrainer, base: Path) -> None:
        module = Classifier(RichBoyNet(64, 16))
        before = copy.deepcopy(module.state_dict())
        trainer = make_trainer(LoRAFinetuning(base_checkpoint=base))
        message = r"does not fit this Classifier: backbone.linear1.weight is \(32, 784\), expected \(64, 784\); .*"
        self.refuse(trainer, message, module=module)
        assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())
        assert not is_adapted(module)

    @pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04"])
    def test_a_damaged_base(self, make_trainer: MakeTrainer, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "bad.ckpt").write_bytes(content)
        trainer = make_trainer(LoRAFinetuning(base_checkpoint=tmp_path / "bad.ckpt"))
        self.refuse(trainer, "bad.ckpt is damaged or not a checkpoint")

    def test_a_truncated_base(self, make_trainer: MakeTrainer, base: Path) -> None:
        path = newest_checkpoint(base)
        path.write_bytes(path.read_bytes()[:-100])
        self.refuse(make_trainer(LoRAFinetuning(base_checkpoint=base)), "is damaged or not a checkpoint")

    def test_adapters_given_as_base_and_a_base_given_as_adapters(self, make_trainer: MakeTrainer, base: Path) -> None:
        trainer, _, _ = finetune(make_trainer, base)
        adapter_path = trainer.checkpoint_callback.best_model_path
        self.refuse(
            make_trainer(LoRAFinetuning(base_checkpoint=adapter_path)),
            "contains adapters instead of a base model. Set base_",
        )
        self.refuse(
            make_trainer(LoRAFinetuning(base_checkpoint=base)),
            "is a full checkpoint, but with LoRAFinetuning, ckpt_path is a checkpoint of adapters",
            ckpt_path=newest_checkpoint(base),
        )

    def test_adapters_of_another_base(self, make_trainer: MakeTrainer, base: Path, tmp_path: Path) -> None:
        trainer, _, callback = finetune(make_trainer, base)
        other = tmp_path / "other"
        make_trainer(ModelCheckpoint(other), max_steps=1, logger=False).fit(model(), datamodule=sample())
        self.refuse(
            make_trainer(LoRAFinetuning(rank=1, base_checkpoint=other)),
            rf"adapters of another base: they were trained on {callback.base_path} \(fingerprint "
            rf"{callback.base_fingerprint[:12]}\), but the base of the model is {newest_checkpoint(other)}",
            ckpt_path=trainer.checkpoint_callback.best_model_path,
        )

    def test_adapters_of_a_base_without_a_file(self, make_trainer: MakeTrainer, base: Path) -> None:
        trainer, _, _ = finetune(make_trainer, None)
        self.refuse(
            make_trainer(LoRAFinetuning(rank=1, base_checkpoint=base)),
            r"they were trained on the model as it was created \(fingerprint .*\), "
            r"but the base of the model is .*ckpt \(.*\)\. "
            "Create the model with the same weights",
            ckpt_path=trainer.checkpoint_callback.best_model_path,
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rank": 2}, r"linear1 \(rank 1, scale 1\), .*; attached: .*linear1 \(rank 2, scale 1\)"),
            ({"alpha": 3}, r"linear1 \(rank 1, scale 1\), .*; attached: .*linear1 \(rank 1, scale 3\)"),
            (
                {"target_modules": ["linear2"]},
                r"linear3 \(rank 1, scale 1\); attached: .*linear2 \(rank 1, scale 1\)\. Configure",
            ),
        ],
    )
    def test_other_adapters_than_configured(
        self, make_trainer: MakeTrainer, base: Path, arguments: dict[str, Any], message: str
    ) -> None:
        trainer, _, _ = finetune(make_trainer, base)
        self.refuse(
            make_trainer(LoRAFinetuning(**({"rank": 1, "base_checkpoint": base} | arguments))),
            message,
            ckpt_path=trainer.checkpoint_callback.best_model_path,
        )

    def test_a_target_that_matches_nothing(self, make_trainer: MakeTrainer) -> None:
        trainer = make_trainer(LoRAFinetuning(target_modules=["linear9"]))
        self.refuse(trainer, r"Targets \['linear9'\] match no layer .* linear1, linear2, linear3")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rank": 2, "alpha": 3}, "has adapters with rank 1 instead of 2, alpha None instead of 3"),
            ({"rank": 1, "adapter": "adapter"}, "has adapters, but adapter is for a model without adapters"),
            (
                {"rank": 1, "base_checkpoint": "base"},
                "has adapters, but base_checkpoint is for a model without adapters",
            ),
        ],
    )
    def test_a_model_with_other_adapters(
        self, make_trainer: MakeTrainer, arguments: dict[str, Any], message: str
    ) -> None:
        _, module, _ = finetune(make_trainer, None)
        trained = adapters(module)
        trainer = make_trainer(LoRAFinetuning(**arguments))
        self.refuse(trainer, rf"{message}\. .*remove its adapters with lora.detach\(model.backbone\)", module=module)
        assert equal(adapters(module), trained)

    def test_a_model_whose_adapters_are_elsewhere(self, make_trainer: MakeTrainer) -> None:
        module = model()
        attach(module, LoRAConfig())
        message = r"has adapters of model instead of model.backbone\. .*remove its adapters with lora.detach\(model\)"
        self.refuse(make_trainer(LoRAFinetuning()), message, module=module)

    def test_a_model_whose_adapters_belong_to_an_outer_module(self, make_trainer: MakeTrainer) -> None:
        module = model()
        attach(nn.ModuleDict({"student": module}), LoRAConfig())
        message = r"has adapters that belong to an outer module, .*remove its adapters with lora.detach\(outer_module\)"
        self.refuse(make_trainer(LoRAFinetuning()), message, module=module)


def test_a_notebook_cell_that_runs_twice_trains_the_adapters_further(make_trainer: MakeTrainer) -> None:
    class AtStart(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.adapters = adapters(pl_module)

    _, module, first = finetune(make_trainer, None)
    trained, at_start = adapters(module), AtStart()
    second = LoRAFinetuning(rank=1)
    make_trainer(second, at_start, max_epochs=1).fit(module, datamodule=sample(digits=[9]))
    assert equal(at_start.adapters, trained)
    assert not equal(adapters(module), trained)
    assert base_fingerprint(module.backbone) == first.base_fingerprint == second.base_fingerprint


def test_a_new_trainer_and_callback_test_the_adapters_that_were_trained(make_trainer: MakeTrainer) -> None:
    trainer, module, _ = finetune(make_trainer, None)
    expected = trainer.test(module, datamodule=sample(), verbose=False)
    trained = adapters(module)
    assert make_trainer(LoRAFinetuning(rank=1)).test(module, datamodule=sample(), verbose=False) == expected
    assert equal(adapters(module), trained)


def test_one_callback_serves_two_models_in_turn(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    callback, (first, second) = LoRAFinetuning(rank=1), (model(), model())
    trainer = make_trainer(callback, max_epochs=1, limit_train_batches=1)
    trainer.fit(first, datamodule=sample())
    make_trainer(callback, max_epochs=1, limit_train_batches=2).fit(second, datamodule=sample())
    trainer = make_trainer(callback, max_epochs=1)
    trainer.test(second, datamodule=sample(), verbose=False)
    trainer.save_checkpoint(tmp_path / "second.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "second.ckpt", weights_only=True)["state_dict"]
    assert equal(saved, adapters(second))
    assert not equal(adapters(first), adapters(second))


def test_a_precision_that_converts_the_base_is_no_change_of_it(make_trainer: MakeTrainer, base: Path) -> None:
    callback = LoRAFinetuning(rank=1, base_checkpoint=base)
    trainer, module = make_trainer(callback, max_epochs=1, limit_train_batches=2, precision="bf16-true"), model()
    trainer.fit(module, datamodule=sample())
    assert callback.adapter_folder is not None
    again = make_trainer(LoRAFinetuning(rank=1, base_checkpoint=base))
    other = model()
    again.test(other, datamodule=sample(), ckpt_path=trainer.checkpoint_callback.best_model_path, verbose=False)
    for key, value in adapters(module).items():
        torch.testing.assert_close(adapters(other)[key], value.float())


@pytest.mark.parametrize("variant", [{}, {"init": "pissa"}, {"use_dora": True}])
@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_adapters_that_were_not_trained_are_said_to_be_the_base(
    make_trainer: MakeTrainer, command: str, variant: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    said = "The adapters are untrained and have no effect. Pass trained ones as ckpt_path."
    callback, module = LoRAFinetuning(rank=2, **variant), model()
    with caplog.at_level("INFO"):
        getattr(make_trainer(callback), command)(module, datamodule=sample())
        assert said in caplog.text
        caplog.clear()
        make_trainer(callback, max_steps=2).fit(module, datamodule=sample())
        getattr(make_trainer(callback), command)(module, datamodule=sample())
        assert said not in caplog.text
