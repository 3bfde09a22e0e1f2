"""What is trained is chosen before `fully_shard`, which remembers it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lora_lightning.lora import LoRAConfig, adapter_names, adapter_state_dict, attach, set_adapter


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.slow  # threads of gloo in the process of the tests, whose data loaders fork
@pytest.mark.usefixtures("one_process")
def test_adapters_are_neither_attached_nor_chosen_once_others_are_distributed() -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    attach(network, LoRAConfig(rank=2), name="seven")
    attach(network, LoRAConfig(rank=2), name="nine")
    fully_shard(network, mesh=init_device_mesh("cpu", (1,)))
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    with pytest.raises(RuntimeError, match=r"distributed by fully_shard.* Attach and choose adapters before that\."):
        set_adapter(network, "seven")
    with pytest.raises(RuntimeError, match=r"distributed by fully_shard.* Attach and choose adapters before that\."):
        attach(network, LoRAConfig(rank=2), name="four")
    assert adapter_names(network) == ["nine", "seven"]
    assert {name for name, parameter in network.named_parameters() if parameter.requires_grad} == trained
    assert all(bool(value.to_local().isfinite().all()) for value in adapter_state_dict(network).values())  # type: ignore[attr-defined]
    assert network(torch.ones(1, 8)).shape == (1, 2)
