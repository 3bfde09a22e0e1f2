"""Distillation to the frozen base, as an option of any training of adapters."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lora_lightning import LoRAFinetuning
from lora_lightning.lora import adapter_parameters, disabled
from tests.helpers import stir

MakeTrainer = Callable[..., Trainer]
IMAGES, CLASSES = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


class Own(LightningModule):
    """Logs nothing, returns nothing but the loss, and has norm layers and dropout."""

    def __init__(self, shape: Callable[[Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.shape = shape
        self.gradients: list[list[Tensor]] = []

    def forward(self, x: Tensor) -> Any:
        return self.shape(self.net(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        output = self(batch[0])
        return F.cross_entropy(output if isinstance(output, Tensor) else output["logits"], batch[1])

    def on_after_backward(self) -> None:
        self.gradients.append([parameter.grad.clone() for parameter in adapter_parameters(self)])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)


def expected(module: Own, weight: float, temperature: float) -> list[Tensor]:
    """The gradient of the sum of both losses, by autograd."""
    module = copy.deepcopy(module)
    module.net[2].p = 0.0
    logits = module.net(IMAGES)
    with torch.no_grad(), disabled(module):
        base = module.net.eval()(IMAGES)
    soft = F.kl_div((logits / temperature).log_softmax(1), (base / temperature).softmax(1), reduction="batchmean")
    loss = F.cross_entropy(logits, CLASSES) + weight * temperature**2 * soft
    return list(torch.autograd.grad(loss, adapter_parameters(module)))


def fit(make_trainer: MakeTrainer, module: Own, callback: LoRAFinetuning, batches: int = 1, **options: Any) -> Any:
    module.net[2].p = 0.0  # the student's dropout can't be known; the teacher has none
    data = DataLoader([(IMAGES, CLASSES)] * batches, batch_size=None)
    trainer = make_trainer(callback, max_epochs=1, **options)
    trainer.fit(module, data)
    return trainer


@pytest.mark.parametrize(
    "shape", [lambda logits: logits, lambda logits: {"features": torch.zeros(12, 1), "logits": logits}]
)
@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 2.0), (0.5, 1.0), (3.0, 4.0)])
def test_the_gradient_is_that_of_the_loss_and_of_the_divergence_from_the_base(
    make_trainer: MakeTrainer, weight: float, temperature: float, shape: Any
) -> None:
    module = Own(shape)
    stirred = LoRAFinetuning(rank=2, distillation=weight, temperature=temperature, verify=False)
    stirred.on_train_start = lambda trainer, pl_module, start=stirred.on_train_start: (
        start(trainer, pl_module),
        stir(module),
    )  # type: ignore[method-assign]
    fit(make_trainer, module, stirred)
    statistics = copy.deepcopy([module.net[1].running_mean, module.net[1].running_var])
    torch.testing.assert_close(module.gradients[0], expected(module, weight, temperature))
    plain = expected(module, 0.0, temperature)
    assert not all(torch.allclose(a, b) for a, b in zip(module.gradients[0], plain, strict=True))
    assert torch.equal(statistics[0], torch.zeros(8)), "the teacher leaves norm statistics alone"
    assert "forward" not in vars(module)


def test_accumulated_batches_count_as_much_as_their_loss(make_trainer: MakeTrainer) -> None:
    once, twice = Own(), Own()
    twice.load_state_dict(once.state_dict())
    torch.manual_seed(1)
    fit(make_trainer, once, LoRAFinetuning(rank=2, distillation=1.0, verify=False))
    torch.manual_seed(1)
    fit(make_trainer, twice, LoRAFinetuning(rank=2, distillation=1.0, verify=False), 2, accumulate_grad_batches=2)
    torch.testing.assert_close(once.gradients[0], twice.gradients[-1])


def test_bf16_is_close(make_trainer: MakeTrainer) -> None:
    module = Own()
    callback = LoRAFinetuning(rank=2, distillation=1.0, verify=False)
    fit(make_trainer, module, callback, precision="bf16-mixed")
    torch.testing.assert_close(module.gradients[0], expected(module, 1.0, 2.0), atol=0.02, rtol=0.05)


def test_without_logits_it_is_said_that_there_is_no_effect(make_trainer: MakeTrainer) -> None:
    module = Own()
    module.training_step = lambda batch, batch_idx: F.cross_entropy(
        nn.Sequential.forward(module.net, batch[0]), batch[1]
    )  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"distillation=1.0 has no effect: the step of Own called no module"):
        fit(make_trainer, module, LoRAFinetuning(rank=2, distillation=1.0, verify=False), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distillation": -1.0}, "distillation=-1.0: expected a finite weight above 0"),
        ({"distillation": 1.0, "temperature": 0.0}, "temperature=0.0: expected a finite number above 0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAFinetuning(rank=2, **options)


def test_it_keeps_what_the_base_says_of_classes_that_are_not_shown(make_trainer: MakeTrainer) -> None:
    """A base that tells three classes apart is trained on one of them alone."""
    torch.manual_seed(0)
    centres = 3 * torch.eye(3, 6)
    images = centres.repeat_interleave(40, 0) + torch.randn(120, 6)
    classes = torch.arange(3).repeat_interleave(40)
    base = Own()
    base.net = nn.Sequential(nn.Linear(6, 3))
    optimizer = torch.optim.Adam(base.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(base(images), classes).backward()
        optimizer.step()
    errors = []
    for weight in (0.0, 2.0):
        module = copy.deepcopy(base)
        module.configure_optimizers = lambda module=module: torch.optim.Adam(  # type: ignore[method-assign]
            [p for p in module.parameters() if p.requires_grad], lr=0.05
        )
        shown = DataLoader([(images[:40], classes[:40])] * 60, batch_size=None)
        make_trainer(LoRAFinetuning(rank=2, distillation=weight), max_epochs=1).fit(module, shown)
        errors.append(int((module(images).argmax(1) != classes)[40:].sum()))
    assert errors[1] < errors[0] / 2


SCRIPT = """
import sys, torch
from lightning.pytorch import Trainer, seed_everything
from lora_lightning import Classifier, LoRAFinetuning, MNISTDataModule, RichBoyNet
from lora_lightning.lora import adapter_state_dict
devices = int(sys.argv[1])
seed_everything(0)
model = Classifier(RichBoyNet(16, 8), lambda parameters: torch.optim.SGD(parameters, lr=0.1))
trainer = Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=1,
                  limit_train_batches=5, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                  callbacks=[LoRAFinetuning(rank=2, distillation=1.0, verify=False)], limit_val_batches=0)
trainer.fit(model, MNISTDataModule(source="sample", batch_size=40 // devices))
if trainer.is_global_zero:
    torch.save(dict(adapter_state_dict(model)), f"{devices}.pt")
if devices > 1:
    torch.distributed.destroy_process_group()
"""


def test_two_devices_train_what_one_does(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    for devices in ("1", "2"):
        subprocess.run(
            [sys.executable, "script.py", devices],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            timeout=300,
        )
    one, two = (torch.load(tmp_path / f"{devices}.pt") for devices in (1, 2))
    torch.testing.assert_close(one, two)
