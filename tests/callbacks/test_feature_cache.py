"""FeatureCache: the same adapters, without computing what is always the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from lora_lightning import Classifier, FeatureCache, ImageFolderDataModule, LoRAFinetuning, MNISTDataModule
from lora_lightning.lora import adapter_state_dict
from tests.benchmarks import vgg19
from tests.helpers import same

MakeTrainer = Callable[..., Trainer]


class Counting(nn.Linear):
    """Counts how often it is computed."""

    computed = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.computed += 1
        return super().forward(input)


class Net(nn.Sequential):
    def __init__(self) -> None:
        layers = Counting(784, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 32), nn.Linear(32, 10)
        super().__init__(nn.Flatten(), *layers)


def fit(
    make_trainer: MakeTrainer, *callbacks: Any, ckpt_path: Path | None = None, **arguments: Any
) -> tuple[dict[str, Any], int, Trainer]:
    torch.manual_seed(0)
    model = Classifier(Net())
    data = MNISTDataModule(source="sample", digits=[3], batch_size=90, val_fraction=0.1)
    trainer = make_trainer(LoRAFinetuning(rank=2, target_modules=["4", "5"]), *callbacks, max_epochs=4, **arguments)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return {key: value.clone() for key, value in adapter_state_dict(model).items()}, model.backbone[1].computed, trainer


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"accumulate_grad_batches": 3},
        {"num_sanity_val_steps": 0},
    ],
)
def test_adapters_are_bitwise_those_of_a_run_without_it(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture, arguments: dict[str, Any]
) -> None:
    expected, computed, plain = fit(make_trainer, **arguments)
    with caplog.at_level("INFO"):
        found, skipped, cached = fit(make_trainer, FeatureCache(), **arguments)
    assert same(found, expected)
    assert cached.callback_metrics["val/loss"] == plain.callback_metrics["val/loss"]
    assert skipped < computed
    assert "Frozen prefix: the output of '2' is computed once per sample and stored" in caplog.text
    assert f"{64 if 'precision' in arguments else 128} bytes per sample" in caplog.text
    assert "The prefix ends before '3', which draws random numbers." in caplog.text


def test_adapters_of_vgg19s_last_two_layers_are_bitwise_those_of_a_run_without_it_or_it_says_why() -> None:
    _, expected = vgg19.fit(cached=False)
    linear, x = torch.nn.Linear(25088, 4096), torch.randn(5, 25088)
    with torch.no_grad():
        by_place = not torch.equal(linear(x.flip(0)).flip(0), linear(x))
    if by_place:
        # So it is with some versions of PyTorch and on some processors: a row of a product depends on its place in the batch.
        with pytest.warns(UserWarning, match="depends on the other samples in its batch"):
            _, found = vgg19.fit(cached=True)
    else:
        _, found = vgg19.fit(cached=True)
    assert same(found, expected)
    assert any(value.abs().max() > 0.001 for key, value in found.items() if key.endswith("lora_B"))


def test_a_resumed_run_ends_with_the_same_adapters(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def files(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / name, filename="{step}", save_top_k=-1, every_n_train_steps=6)

    expected, _, _ = fit(make_trainer, FeatureCache(), files("whole"))
    halfway = tmp_path / "whole" / "step=6.ckpt"
    found, _, _ = fit(make_trainer, FeatureCache(), files("resumed"), ckpt_path=halfway)
    assert same(found, expected)


def test_from_the_second_epoch_on_nothing_is_computed_again(make_trainer: MakeTrainer) -> None:
    data = MNISTDataModule(source="sample", digits=[3], batch_size=90, val_fraction=0.1)  # 360 images
    model, counts = Classifier(Net()), []

    class Epochs(FeatureCache):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            counts.append(pl_module.backbone[1].computed)

    callbacks = LoRAFinetuning(rank=2, target_modules=["4", "5"]), Epochs()
    make_trainer(*callbacks, max_epochs=3, limit_val_batches=0).fit(model, datamodule=data)
    assert counts[0] == counts[1] == counts[2]


def test_afterwards_the_model_is_as_it_was(make_trainer: MakeTrainer) -> None:
    model = Classifier(Net())
    hooks = len(model.backbone._forward_pre_hooks)
    trainer = make_trainer(LoRAFinetuning(rank=2, target_modules=["4", "5"]), FeatureCache(), max_epochs=2)
    trainer.fit(model, datamodule=MNISTDataModule(source="sample", digits=[3], batch_size=90))
    assert not any("forward" in vars(module) for module in model.modules())
    assert len(model.backbone._forward_pre_hooks) == hooks


def test_layers_that_were_frozen_by_hand_are_a_prefix_too(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    model = Classifier(Net())
    model.backbone[1].requires_grad_(False)
    trainer = make_trainer(FeatureCache(), max_epochs=1, limit_val_batches=0)
    with caplog.at_level("INFO"):
        trainer.fit(model, datamodule=MNISTDataModule(source="sample", digits=[3], batch_size=90))
    assert "Frozen prefix: the output of '2' is computed once" in caplog.text


def test_augmented_images_are_trained_without_it(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "root" / name).mkdir(parents=True)
        Image.new("L", (28, 28)).save(tmp_path / "root" / name / "0.png")
    data = ImageFolderDataModule(tmp_path / "root", augmentation=v2.RandomHorizontalFlip(), num_workers=0)
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 2)), num_classes=2)
    trainer = make_trainer(FeatureCache(), limit_val_batches=0)
    with pytest.warns(UserWarning, match=r"FeatureCache stores nothing: the augmentation of ImageFolderDataModule"):
        trainer.fit(model, datamodule=data)
    assert trainer.state.finished


def test_a_network_whose_first_layer_trains_is_trained_without_it(make_trainer: MakeTrainer) -> None:
    found = []
    for cache in ([], [FeatureCache()]):
        torch.manual_seed(0)
        model = Classifier(Net())
        trainer = make_trainer(LoRAFinetuning(rank=2, target_modules="all"), *cache, max_epochs=1)
        with (
            contextlib.nullcontext()
            if not cache
            else pytest.warns(UserWarning, match=r"no frozen prefix before '1', which trains")
        ):
            trainer.fit(model, datamodule=MNISTDataModule(source="sample"))
        assert not any("forward" in vars(module) for module in model.modules())
        found.append(adapter_state_dict(model))
    assert same(*found)
