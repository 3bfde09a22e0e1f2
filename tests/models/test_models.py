"""`Classifier`, `RichBoyNet` and `OneCycle`."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn

from lora_lightning import Classifier, MNISTDataModule, RichBoyNet
from lora_lightning.models import OneCycle


def small() -> RichBoyNet:
    return RichBoyNet(16, 8)


def sample(**arguments: object) -> MNISTDataModule:
    return MNISTDataModule(**({"source": "sample", "batch_size": 100} | arguments))


def test_the_over_sized_mlp_is_784_1000_2000_10() -> None:
    net = RichBoyNet()
    assert [tuple(layer.weight.shape) for layer in net.children() if isinstance(layer, nn.Linear)] == [
        (1000, 784),
        (2000, 1000),
        (10, 2000),
    ]
    assert net(torch.randn(3, 1, 28, 28)).shape == (3, 10)


def test_steps_return_what_callbacks_need() -> None:
    model = Classifier(small())
    batch = torch.randn(5, 1, 28, 28), torch.arange(5)
    logits = model.predict_step(batch, 0)
    assert torch.equal(logits, model(batch[0]))
    assert torch.equal(model.predict_step(batch[0], 0), logits)


def test_an_epoch_on_the_sample_learns_and_logs(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(max_epochs=2, log_every_n_steps=7)
    model = Classifier(RichBoyNet(64, 32))
    trainer.fit(model, datamodule=sample(batch_size=50))
    metrics = trainer.callback_metrics
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy"} <= set(metrics)
    assert metrics["val/accuracy"] > 0.8
    (result,) = trainer.test(model, datamodule=sample(), verbose=False)
    correct = sum(int((model(images).argmax(1) == digits).sum()) for images, digits in _test_batches())
    assert result["test/accuracy"] == pytest.approx(correct / 2000)


def _test_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    data = sample()
    data.setup("test")
    return [data.on_after_batch_transfer(batch, 0) for batch in data.test_dataloader()]


def test_adam_is_fused_by_default_and_takes_what_trains() -> None:
    model = Classifier(small())
    model.backbone.linear1.requires_grad_(False)
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.defaults["fused"]
    assert optimizer.defaults["lr"] == 1e-3
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 4


def test_a_scheduler_is_stepped_after_every_step(make_trainer: Callable[..., Trainer]) -> None:
    model = Classifier(
        small(), lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    )
    trainer = make_trainer(max_steps=3)
    trainer.fit(model, datamodule=sample())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 / 8)


def test_reduce_on_plateau_follows_its_metric() -> None:
    model = Classifier(small(), lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val/loss"))
    assert model.configure_optimizers()["lr_scheduler"]["monitor"] == "val/loss"


def test_one_cycle_peaks_at_30_percent_and_ends_near_nothing(make_trainer: Callable[..., Trainer]) -> None:
    rates: list[float] = []

    class Recording(Classifier):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    model = Recording(small(), lr_scheduler=OneCycle)
    make_trainer(max_steps=21, max_epochs=5).fit(model, datamodule=sample(batch_size=300))
    assert rates[0] == pytest.approx(1e-3 / 25)
    assert rates.index(max(rates)) == 6
    assert max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-3 / 250_000)


def test_one_cycle_agrees_with_pytorchs() -> None:
    ours, theirs = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1) for _ in range(2))
    cycle = OneCycle(ours)
    cycle.spread_over(50)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        theirs, 0.1, total_steps=50, final_div_factor=1e4, cycle_momentum=False
    )
    for step in range(49):
        if step > 16:  # the two round the step of the peak differently
            assert cycle.get_last_lr() == pytest.approx(reference.get_last_lr(), rel=0.06)
        ours.step(), theirs.step()
        cycle.step(), reference.step()


def test_one_cycle_needs_an_end(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(max_epochs=-1, max_time="00:00:01:00")
    with pytest.raises(ValueError, match="set max_epochs or max_steps of the Trainer"):
        trainer.fit(Classifier(small(), lr_scheduler=OneCycle), datamodule=sample())


def test_a_classifier_has_two_classes_at_least() -> None:
    with pytest.raises(ValueError, match="num_classes=1: expected at least 2"):
        Classifier(small(), num_classes=1)


def test_a_backbone_of_another_number_of_classes_is_refused(make_trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(ValueError, match=r"The backbone returns 10 logits, but num_classes=3"):
        make_trainer(max_epochs=1).fit(Classifier(small(), num_classes=3), datamodule=sample())


def test_a_backbone_may_return_its_logits_as_one_field_of_several() -> None:
    class Wrapped(nn.Module):
        def forward(self, x: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=2 * x, hidden_states=None)

    assert torch.equal(Classifier(Wrapped())(torch.ones(2, 3)), torch.full((2, 3), 2.0))


def test_the_accuracy_is_that_of_the_samples_with_a_target(make_trainer: Callable[..., Trainer]) -> None:
    logits = torch.eye(3)[[0, 0, 0, 0, 1, 2, 0, 1]]
    targets = torch.tensor([0, -100, -100, -100, 0, 0, 1, -100])  # one of four is right
    model = Classifier(nn.Identity())
    for batch_size in (1, 4, 8):
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(logits, targets), batch_size=batch_size)
        (logged,) = make_trainer().test(model, loader, verbose=False)
        assert logged["test/accuracy"] == pytest.approx(0.25)
        assert logged["test/loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, targets)))
