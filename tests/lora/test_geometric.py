"""Networks on graphs: layers of PyTorch Geometric, and layers that save their weights themselves."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from lora_lightning import ConfusionReport, LoRAConfig, LoRAFinetuning, load_adapter, save_adapter
from lora_lightning.lora import adapter_state_dict, attach, base_fingerprint, detach, disabled, merge, verify_adapters
from tests.helpers import same, state, stir

with warnings.catch_warnings():
    # It scripts a class on import, and 2.7 imports a package that it deprecates:
    # https://github.com/pyg-team/pytorch_geometric/issues/10697 and pull/10411
    warnings.filterwarnings("ignore", message="`torch.jit.script` is|`torch_geometric.distributed`")
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader
    from torch_geometric.nn import GATConv, GCNConv, Linear, RGCNConv, SAGEConv

LAYERS = ["gcn.lin", "gat.lin", "sage.lin_l", "sage.lin_r", "head"]
RELATIONS = LoRAConfig(rank=2, target_modules=LAYERS, target_parameters=["rgcn.weight"])


class Graphs(LightningModule):
    """Classifies the nodes of graphs with edges of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.gcn, self.gat, self.sage = GCNConv(6, 8), GATConv(8, 8, heads=2, concat=False), SAGEConv(8, 8)
        self.rgcn, self.head = RGCNConv(8, 8, num_relations=2), Linear(8, 3)

    def forward(self, graph: Data) -> Tensor:
        x = self.gcn(graph.x, graph.edge_index).relu()
        x = self.sage(self.gat(x, graph.edge_index).relu(), graph.edge_index).relu()
        return self.head(self.rgcn(x, graph.edge_index, graph.kind))

    def training_step(self, batch: Data, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch), batch.y)

    def test_step(self, batch: Data, batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx), batch_size=batch.num_graphs)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([each for each in self.parameters() if each.requires_grad], 0.01)


def graph() -> Data:
    x, edges, kind = torch.randn(7, 6), torch.randint(0, 7, (2, 20)), torch.randint(0, 2, (20,))
    return Data(x=x, edge_index=edges, kind=kind, y=torch.randint(0, 3, (7,)))


@pytest.fixture
def net() -> Graphs:
    torch.manual_seed(0)
    return Graphs()


def test_all_adapts_every_linear_layer_and_experts_are_its_relations(net: Graphs) -> None:
    assert attach(net, LoRAConfig(rank=2)) == LAYERS
    detach(net)
    assert attach(net, RELATIONS) == [*LAYERS[:4], "rgcn.weight", "head"]
    assert net.rgcn.lora_weight.default.lora_A.shape == (2, 2, 8)


@pytest.mark.parametrize(
    "config",
    [RELATIONS, LoRAConfig(rank=2, target_modules=[], target_parameters=[f"{name}.weight" for name in LAYERS])],
    ids=["layers", "parameters"],
)
def test_they_are_trained_saved_merged_and_detached_as_other_layers(
    config: LoRAConfig, net: Graphs, tmp_path: Path
) -> None:
    plain, before, x = copy.deepcopy(net), state(net), graph()
    attach(net, config)
    digest = base_fingerprint(net)
    assert torch.equal(net(x), plain(x))
    stir(net)
    verify_adapters(net, x)
    assert base_fingerprint(net) == digest
    saved = net.state_dict()
    assert all(torch.equal(saved[key], value) for key, value in before.items())
    assert saved.keys() - before.keys() == adapter_state_dict(net).keys()
    with disabled(net):
        assert torch.equal(net(x), plain(x))
    save_adapter(net, tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["peft_type"]
    if config is RELATIONS:
        assert written == "LORA_LIGHTNING"  # PEFT does not know these layers
    else:
        assert written == "LORA"  # it adapts parameters of any layer by name
        of_peft = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "adapter"))
        assert torch.equal(of_peft(x), net(x))
    again = copy.deepcopy(plain)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(x), net(x))
    loaded = copy.deepcopy(plain)
    attach(loaded, config)
    loaded.load_state_dict(saved)
    assert torch.equal(loaded(x), net(x))
    merge(again)
    assert type(again.head) is Linear
    torch.testing.assert_close(again(x), net(x))
    detach(net)
    assert torch.equal(net(x), plain(x))
    assert same(state(net), before)


def test_a_run_trains_resumes_and_tests_them(net: Graphs, tmp_path: Path) -> None:
    graphs = DataLoader([graph() for _ in range(6)], batch_size=2)
    settings: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}

    def trainer(epochs: int) -> Trainer:
        seed_everything(1, verbose=False)
        callbacks = [LoRAFinetuning(rank=2, target_parameters=["rgcn.weight"]), ConfusionReport(verbose=False)]
        return Trainer(
            **settings, max_epochs=epochs, callbacks=callbacks, default_root_dir=tmp_path, log_every_n_steps=1
        )

    base, first, whole = copy.deepcopy(net), trainer(1), copy.deepcopy(net)
    first.fit(net, graphs)
    resumed, path = trainer(2), first.checkpoint_callback.best_model_path
    resumed.fit(base, graphs, ckpt_path=path)
    trainer(2).fit(whole, graphs)
    assert same(adapter_state_dict(base), adapter_state_dict(whole))
    resumed.test(base, graphs, verbose=False)
    assert sum(map(sum, resumed.callbacks[1].report.adapted.matrix.tolist())) == 6 * 7


class SavesItself(nn.Linear):
    """A layer that writes what it reads to the state dict."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
        destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()


def test_a_layer_that_saves_the_weight_it_reads_saves_that_of_the_base_and_the_adapter() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(SavesItself(4, 3))
    before = state(net)
    attach(net, LoRAConfig(rank=2))
    stir(net)
    saved = net.state_dict()
    assert torch.equal(saved["0.weight"], before["0.weight"])
    assert len(saved) == 4
