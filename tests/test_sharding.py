"""Runs whose weights are distributed over processes: FSDP2 and tensor parallelism, on CPU processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import processes
from tests.processes import Process

SCRIPT = """
import json, os, sys
from pathlib import Path
import lightning.pytorch as pl
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from lora_lightning import ConfusionReport, LoRAFinetuning, lora
from lora_lightning.lora import sharding
from lora_lightning.checkpoints import NotFiniteError

how = json.loads(sys.argv[1])
devices, kind = how["devices"], how["kind"]
torch.set_num_threads(1)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        if not how.get("late"):
            self.make()

    def make(self):
        torch.manual_seed(how.get("base", 3))
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    def configure_model(self):
        if not hasattr(self, "net"):
            self.make()
        if isinstance(self.net, FSDPModule) or any(isinstance(value, DTensor) for value in self.net.parameters()):
            return
        if kind == "fsdp":
            mesh = self.device_mesh["data_parallel"]
            for layer in self.net if how.get("each_layer") else ():
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)
        if kind == "tensor":
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05, foreach=False)


class Following(Module):
    # Its own code updates a frozen parameter and a buffer.
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.teacher = nn.Linear(8, 3).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(3))

    def configure_model(self):
        super().configure_model()
        if not isinstance(self.teacher, FSDPModule):
            fully_shard(self.teacher, mesh=self.device_mesh["data_parallel"])

    def forward(self, x):
        return self.net(x) - self.teacher(x) - self.centre

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        self.teacher.weight.mul_(0.9)
        self.centre += 0.1


def loader():
    x = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    samples, share = TensorDataset(x, x.argmax(1) % 3), devices if kind == "fsdp" else 1
    rank = int(os.environ.get("LOCAL_RANK", 0)) if share > 1 else 0
    sampler = DistributedSampler(samples, num_replicas=share, rank=rank, shuffle=False)
    return DataLoader(samples, batch_size=8 // share, sampler=sampler)


seed_everything(1, verbose=False)
sizes = {"fsdp": (devices, 1), "tensor": (1, devices)}
strategy = (
    "auto" if kind == "one" else ModelParallelStrategy(*sizes[kind], save_distributed_checkpoint=how["distributed"])
)
make = Following if how.get("follows") else Module
report, module = ConfusionReport(verbose=False), make()
files = ModelCheckpoint(how["out"], save_last=True, filename="{epoch}")
trainer = Trainer(
    accelerator="cpu", devices=devices, strategy=strategy, max_epochs=how.get("epochs", 2), enable_progress_bar=False,
    enable_model_summary=False, logger=CSVLogger(how["out"]), log_every_n_steps=1, num_sanity_val_steps=0,
    callbacks=[LoRAFinetuning(rank=2), report, files], use_distributed_sampler=False,
)
trainer.fit(module, loader(), loader(), ckpt_path=how.get("ckpt_path"))
adapted = lora.backbone_of(module)
state = {key: sharding.full(value).tolist() for key, value in lora.adapter_state_dict(adapted).items()}
if how.get("follows"):
    state |= {"teacher": sharding.full(module.teacher.weight).tolist(), "centre": module.centre.tolist()}
trainer.test(module, loader(), verbose=False)
if trainer.is_global_zero:
    matrices = [report.report.adapted.matrix.tolist(), report.report.base.matrix.tolist()]
    loss = float(trainer.callback_metrics["val_loss"])
    Path(how["out"], "out.json").write_text(json.dumps({"state": state, "loss": loss, "matrices": matrices}))
if kind == "fsdp":
    weights = os.path.join(how["out"], "weights.ckpt")
    trainer.save_checkpoint(weights, weights_only=True)
    other = ModelParallelStrategy(*sizes[kind], save_distributed_checkpoint=how["distributed"])
    again = Trainer(accelerator="cpu", devices=devices, strategy=other, logger=False, enable_progress_bar=False,
                    callbacks=[LoRAFinetuning(rank=2)], use_distributed_sampler=False)
    again.test(make(), loader(), ckpt_path=weights, verbose=False)
    assert torch.equal(again.callback_metrics["val_loss"], trainer.callback_metrics["val_loss"])
    up = lora.adapted_weights(adapted)[0].factors[1]
    if trainer.global_rank == devices - 1:
        sharding.local(up.detach()).fill_(float("nan"))
    refused = os.path.join(how["out"], "refused.ckpt")
    try:
        trainer.save_checkpoint(refused)
        raise AssertionError("adapters that are not finite were saved")
    except NotFiniteError as error:
        assert "refused.ckpt is not written: " in str(error)
    assert not os.path.exists(refused)
    lora.detach(adapted)
    plain = os.path.join(how["out"], "plain.ckpt")
    trainer.save_checkpoint(plain, weights_only=True)
    if trainer.is_global_zero:
        if how["distributed"]:
            saved = FileSystemReader(plain).read_metadata().state_dict_metadata
            assert "lora_lightning" not in torch.load(os.path.join(plain, "meta.pt"), weights_only=True)
        else:
            saved = torch.load(plain, weights_only=True)
            assert "lora_lightning" not in saved
            saved = saved["state_dict"]
        assert {key.removeprefix("state_dict.") for key in saved} == set(module.state_dict())
"""


def run(out: Path, *, fails: bool = False, **how: Any) -> Any:
    """Return what a run found, or what it printed if it `fails`."""
    out.mkdir()
    (out / "run.py").write_text(SCRIPT)
    words = ["run.py", json.dumps({"distributed": True, "out": str(out), **how})]
    process = Process(*words, folder=out, devices=how["devices"])
    output = process.finish()
    assert (process.code != 0) == fails, output
    return output if fails else json.loads((out / "out.json").read_text())


def assert_alike(found: Any, expected: Any) -> None:
    for key, value in expected["state"].items():
        torch.testing.assert_close(torch.tensor(found["state"][key]), torch.tensor(value), rtol=1e-4, atol=1e-5)
    assert found["matrices"] == expected["matrices"]
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(tmp_path_factory.mktemp("runs") / "alone", kind="one", devices=1)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"kind": "fsdp"}, marks=pytest.mark.slow),
        {"kind": "fsdp", "each_layer": True, "distributed": False},
        pytest.param({"kind": "fsdp", "each_layer": True, "late": True}, marks=pytest.mark.slow),
        pytest.param({"kind": "tensor", "distributed": False}, marks=pytest.mark.slow),
        pytest.param({"kind": "tensor", "late": True}, marks=pytest.mark.slow),
    ],
    ids=[
        "fsdp",
        "fsdp of each layer",
        "fsdp of layers made late",
        "tensor parallel",
        "tensor parallel layers made late",
    ],
)
def test_two_processes_train_the_adapters_of_one(how: dict[str, Any], alone: Any, tmp_path: Path) -> None:
    assert_alike(run(tmp_path / "two", devices=2, **how), alone)
    (weights,) = (tmp_path / "two").rglob("adapter_model.safetensors")
    assert weights.stat().st_size < 4000


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [True, False], ids=["sharded", "one file"])
def test_a_checkpoint_of_two_processes_holds_adapters_and_resumes_on_one_and_three(
    distributed: bool, alone: Any, tmp_path: Path
) -> None:
    how = {"kind": "fsdp", "each_layer": True, "distributed": distributed}
    run(tmp_path / "two", devices=2, epochs=1, **how)
    path = tmp_path / "two" / "last.ckpt"
    if not distributed:
        saved = torch.load(path, weights_only=True)
        assert {key.rpartition(".")[2] for key in saved["state_dict"]} == {"lora_A", "lora_B"}
    assert_alike(run(tmp_path / "one", devices=1, ckpt_path=str(path), **how), alone)
    three = run(tmp_path / "three", devices=3, ckpt_path=str(path), **how)
    assert three["state"].keys() == alone["state"].keys()
    message = run(tmp_path / "other", devices=1, ckpt_path=str(path), base=4, fails=True, **how)
    assert "contains adapters of another base" in message


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [True, False], ids=["sharded", "one file"])
def test_frozen_tensors_that_the_modules_own_code_updates_are_resumed(distributed: bool, tmp_path: Path) -> None:
    how = {"kind": "fsdp", "devices": 2, "distributed": distributed, "follows": True}
    whole = run(tmp_path / "whole", **how)
    run(tmp_path / "half", epochs=1, **how)
    assert run(tmp_path / "resumed", ckpt_path=str(tmp_path / "half" / "last.ckpt"), **how) == whole
    assert whole["state"]["centre"] == pytest.approx([0.6] * 3)


BOTH_WAYS = """
import json, os, sys
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from lora_lightning import LoRAConfig, lora
from lora_lightning.lora.sharding import distribute_adapters, full

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.last = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.down(torch.tanh(self.up(x)))))

torch.set_num_threads(1)
data, tensor, early, config = json.loads(sys.argv[1])
torch.manual_seed(0)
net, rank = Net(), 0
x, y = torch.randn(8, 8), torch.arange(8) % 3
if early:
    lora.attach(net, LoRAConfig(**config))
if data * tensor > 1:
    mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tensor"))
    if tensor > 1:
        with lora.bare(net):
            parallelize_module(net, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if data > 1:
        fully_shard(net, mesh=mesh["data"])
    rank = mesh.get_local_rank("data")
if not early:
    lora.attach(net, LoRAConfig(**config))
if data * tensor > 1:
    distribute_adapters(net, mesh["data"].get_group())
generator = torch.Generator().manual_seed(3)
with torch.no_grad():  # trained adapters: with B = 0, everything looks right
    for weight in lora.adapted_weights(net):
        for factor in weight.adapter.parameters():
            value = torch.randn(factor.shape, generator=generator) / 4
            if hasattr(factor, "device_mesh"):
                value = torch.distributed.tensor.distribute_tensor(value, factor.device_mesh, factor.placements)
            factor.copy_(value)
optimizer = torch.optim.SGD(lora.adapter_parameters(net), lr=0.5)
share = len(x) // data
for _ in range(3):
    optimizer.zero_grad()
    part = slice(rank * share, (rank + 1) * share)
    nn.functional.cross_entropy(net(x[part]), y[part]).backward()
    optimizer.step()
output = net(x)
found = {key: full(value.detach()).tolist() for key, value in lora.adapter_state_dict(net).items()}
found["output"] = full(output.detach()).tolist()
if int(os.environ.get("RANK", 0)) == 0:
    print("FOUND" + json.dumps(found))
if data * tensor > 1:
    torch.distributed.destroy_process_group()
"""


def both_ways(folder: Path, data: int, tensor: int, *, early: bool = False, **config: Any) -> dict[str, Any]:
    """Return the adapters and the output after three steps on a mesh of this size."""
    script = folder / f"run_{data}_{tensor}_{early}.py"
    script.write_text(BOTH_WAYS)
    words = [str(script), json.dumps([data, tensor, early, {"rank": 2} | config])]
    output = processes.run(*words, folder=folder, devices=data * tensor)
    (line,) = (line for line in output.splitlines() if line.startswith("FOUND"))
    return json.loads(line.removeprefix("FOUND"))


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("data", "tensor"), [(2, 1), (1, 2), (2, 2)])
def test_adapters_on_a_mesh_of_one_or_two_dimensions_train_as_in_one_process(
    data: int, tensor: int, early: bool, tmp_path: Path
) -> None:
    alone = both_ways(tmp_path, 1, 1)
    found = both_ways(tmp_path, data, tensor, early=early)
    assert found.keys() == alone.keys()
    for key, value in alone.items():
        torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(value), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True], ids=["adapters last", "adapters first"])
@pytest.mark.parametrize(("data", "tensor"), [(2, 1), (1, 2)], ids=["fully_shard", "tensor parallel"])
def test_biases_train_as_in_one_process(data: int, tensor: int, early: bool, tmp_path: Path) -> None:
    """Those of adapters, which layers add to their own, and these, which are trained in full."""
    config = {"lora_bias": True, "bias": "lora_only"}
    alone = both_ways(tmp_path, 1, 1, **config)
    assert any(key.endswith("lora_bias") for key in alone)
    found = both_ways(tmp_path, data, tensor, early=early, **config)
    assert found.keys() == alone.keys()
    for key, value in alone.items():
        torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(value), rtol=1e-4, atol=1e-5)
