"""The variants of LoRA in real trainings of a module of a user's own, which is no `Classifier`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import Classifier, LoRAFinetuning, load_adapter
from lora_lightning.checkpoints import newest_checkpoint
from lora_lightning.lora import adapter_state_dict, base_fingerprint, disabled, is_adapted
from lora_lightning.models import OneCycle

MakeTrainer = Callable[..., Trainer]
Scheduler = Callable[[torch.optim.Optimizer], Any]


class Tagger(pl.LightningModule):
    """A transformer over token indices, with all its layers at the top, and a norm layer with statistics."""

    def __init__(self, scheduler: Scheduler | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8, padding_idx=0)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(8, 8))
        self.scheduler = scheduler

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.norm(self.encoder(self.embed(index)).mean(1) @ self.scale))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        index, target = batch
        return nn.functional.cross_entropy(self(index), target)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}


def data() -> DataLoader[Any]:
    index = torch.randint(1, 20, (24, 5), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(index, index[:, 0] % 3), batch_size=8)


def inputs() -> Tensor:
    return next(iter(data()))[0]


VARIANTS: dict[str, dict[str, Any]] = {
    "all layers": {},
    "use_dora": {"use_dora": True, "use_rslora": True},
    "pissa": {"init": "pissa", "alpha": 3.0},
    "head and norm trained in full": {"modules_to_save": ["head", "norm"], "exclude_modules": ["head"]},
    "a parameter": {"target_modules": [], "target_parameters": ["scale"]},
}


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:The number of training batches")
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_trained_saved_resumed_and_tested(
    variant: str, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    arguments = {"rank": 2, **VARIANTS[variant]}
    base = Tagger()
    digest_of_all = base_fingerprint(base)
    plain = copy.deepcopy(base).eval()

    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[Trainer, Tagger, LoRAFinetuning]:
        module, callback = copy.deepcopy(base), LoRAFinetuning(**arguments)
        torch.manual_seed(3)
        files = ModelCheckpoint(tmp_path / f"{epochs} {ckpt_path is None}", save_last=True)
        trainer = make_trainer(callback, files, max_epochs=epochs)
        trainer.fit(module, data(), ckpt_path=ckpt_path)
        return trainer, module.eval(), callback

    _, module, callback = run(2)
    assert callback.adapter_folder is not None
    with disabled(module):
        torch.testing.assert_close(module(inputs()), plain(inputs()))
    again = copy.deepcopy(base)
    load_adapter(again, callback.adapter_folder)
    torch.testing.assert_close(again.eval()(inputs()), module(inputs()))

    path = newest_checkpoint(tmp_path / "2 True")
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert set(saved) == set(adapter_state_dict(module))
    other = copy.deepcopy(base)
    make_trainer(LoRAFinetuning(**arguments)).test(other, data(), ckpt_path=path, verbose=False)
    assert torch.equal(other.eval()(inputs()), module(inputs()))

    _, resumed, _ = run(4, path)
    state = adapter_state_dict(resumed)
    assert any(not torch.equal(state[key], value) for key, value in adapter_state_dict(module).items())
    assert base_fingerprint(base) == digest_of_all
    assert not is_adapted(base)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"use_dora": True}, "rank 2, scale 1, DoRA"),
        ({"init": "pissa"}, "rank 2, scale 1, PiSSA"),
        ({"target_modules": ["embed"]}, "attached: embed .rank 2, scale 1.. Configure"),
        ({"modules_to_save": ["norm"]}, "norm .trained in full."),
    ],
)
def test_a_checkpoint_of_another_variant_is_refused(
    other: dict[str, Any], difference: str, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    base = Tagger()
    make_trainer(LoRAFinetuning(rank=2), ModelCheckpoint(tmp_path / "c"), max_epochs=1).fit(copy.deepcopy(base), data())
    trainer = make_trainer(LoRAFinetuning(rank=2, **other))
    with pytest.raises(ValueError, match=rf"contains adapters that differ from those of the model\. .*{difference}"):
        trainer.test(base, data(), ckpt_path=newest_checkpoint(tmp_path / "c"))


SCHEDULERS: dict[str, Scheduler | None] = {
    "none": None,
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 2),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 13),
    "one cycle": OneCycle,
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
}


class Rates(pl.Callback):
    """Notes the learning rates that the optimizer steps with."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
        def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            self.seen.append([group["lr"] for group in optimizer.param_groups])

        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(note)


def trained_classifier(
    lr_ratio: float,
    scheduler: str,
    make_trainer: MakeTrainer,
    *callbacks: pl.Callback,
    adapters: bool = True,
    ckpt_path: Path | None = None,
) -> tuple[Classifier, Rates]:
    torch.manual_seed(2)
    net, rates = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), Rates()
    module = Classifier(net, lr_scheduler=SCHEDULERS[scheduler], lr_ratio=lr_ratio)
    torch.manual_seed(3)
    ours = [LoRAFinetuning(rank=2)] if adapters else []
    trainer = make_trainer(*ours, rates, *callbacks, max_epochs=4, limit_val_batches=0)
    images, targets = torch.randn(24, 5), torch.arange(24) % 3
    loader = DataLoader(TensorDataset(images, targets), batch_size=8)
    trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
    if len(trainer.optimizers[0].param_groups) == 2:
        of_a, of_b = ({id(p) for p in group["params"]} for group in trainer.optimizers[0].param_groups)
        assert of_b == {id(p) for name, p in module.named_parameters() if "lora_B" in name}
        assert of_a | of_b == {id(p) for p in module.parameters() if p.requires_grad}
    return module, rates


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_lora_plus_keeps_its_ratio_under_any_scheduler_and_after_resuming(
    scheduler: str, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    each_epoch = ModelCheckpoint(tmp_path / "whole", filename="{epoch}", save_top_k=-1)
    whole, rates = trained_classifier(16, scheduler, make_trainer, each_epoch)
    plain, rates_of_plain = trained_classifier(1, scheduler, make_trainer)
    assert all(b == pytest.approx(16 * a) for a, b in rates.seen)
    assert [a for a, _ in rates.seen] == pytest.approx([rate for [rate] in rates_of_plain.seen])
    resumed, of_rest = trained_classifier(16, scheduler, make_trainer, ckpt_path=tmp_path / "whole" / "epoch=1.ckpt")
    assert of_rest.seen == rates.seen[6:]
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())
    assert any(not torch.equal(value, plain.state_dict()[key]) for key, value in whole.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_lora_plus_without_adapters_has_no_effect_and_says_so(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        _, rates = trained_classifier(16, "none", make_trainer, adapters=False)
    assert rates.seen == [[1e-3]] * 12
    assert caplog.text.count("lr_ratio=16 has no effect: the model has no adapters.") == 1


def test_a_ratio_below_one_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"lr_ratio=0.5: expected the ratio of the learning rates of B and A, at least 1"
    ):
        Classifier(nn.Linear(2, 2), lr_ratio=0.5)


def test_the_ratio_is_no_setting_of_the_adapters() -> None:
    with pytest.raises(ValueError, match=r"lr_ratio .* Classifier.lr_ratio=16. or --model.lr_ratio 16, .*param_groups"):
        LoRAFinetuning(lr_ratio=16)


class Unused(Tagger):
    """Holds a layer that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.tail = nn.Linear(8, 3)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_an_adapter_that_training_never_reaches_is_named_after_the_first_epoch(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(LoRAFinetuning(rank=2), max_epochs=2)
    with pytest.warns(UserWarning, match="Training has not changed the adapters of 'tail': no gradient") as caught:
        trainer.fit(Unused(), data())
    assert sum("has not changed" in str(each.message) for each in caught) == 1
    make_trainer(LoRAFinetuning(rank=2, verify=False), max_epochs=1).fit(Unused(), data())


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:You defined a `validation_step`")
def test_a_bypass_is_trained_saved_and_tested(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    base = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)))
    arguments = {"rank": 3, "target_modules": [], "bypass": (784, 10)}
    module, callback = copy.deepcopy(base), LoRAFinetuning(**arguments)
    images = DataLoader(TensorDataset(torch.randn(16, 1, 28, 28), torch.arange(16) % 10), batch_size=8)
    make_trainer(callback, ModelCheckpoint(tmp_path / "c"), max_epochs=2).fit(module, images)
    assert sum(value.numel() for value in adapter_state_dict(module).values()) == 784 * 3 + 3 * 10
    assert all(value.any() for value in adapter_state_dict(module).values())
    other = copy.deepcopy(base)
    trainer = make_trainer(LoRAFinetuning(**arguments))
    trainer.test(other, images, ckpt_path=newest_checkpoint(tmp_path / "c"), verbose=False)
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(other(x), module(x))
    assert callback.adapter_folder is not None
    load_adapter(base.backbone, callback.adapter_folder)
    assert torch.equal(base(x), module(x))
