"""EVA: ranks and initial values from the inputs of the layers, as in PEFT."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_lightning import LoRAConfig, lora, save_adapter
from tests.helpers import same, state, stir

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of PEFT's dependencies, while they are imported
    import peft

CONFIG = LoRAConfig(rank=4, init="eva")


def mlp() -> nn.Sequential:
    sizes = (40, 64, 48, 32)
    layers = [[nn.Linear(before, after), nn.Tanh()] for before, after in zip(sizes, (*sizes[1:], 24), strict=True)]
    return nn.Sequential(*[layer for pair in layers for layer in pair][:-1])


def inputs(count: int = 256) -> Tensor:
    """Vectors with a few strong directions."""
    return torch.randn(count, 40) @ torch.diag(torch.linspace(3, 0.1, 40)) + 1


def ranks(net: nn.Module) -> dict[str, int]:
    return {weight.name: weight.rank for weight in lora.adapted_weights(net)}


def seen_by(net: nn.Sequential, x: Tensor, index: int) -> Tensor:
    with torch.no_grad():
        return net[:index](x)


def test_several_batches_give_the_components_of_a_full_svd_of_all_inputs() -> None:
    net, x = mlp(), inputs()
    found = lora.eva(net, CONFIG, x.split(50))
    for name, vectors in found.vectors.items():
        whole = seen_by(net, x, int(name))
        _, _, expected = torch.linalg.svd(whole - whole.mean(0), full_matrices=False)
        cosines = (vectors * expected[: len(vectors)]).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones(len(vectors)), atol=1e-4, rtol=0)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))


def test_ranks_go_where_a_component_explains_most_and_their_sum_stays() -> None:
    net, x = mlp(), inputs()
    found = lora.eva(net, CONFIG, x.split(50))
    shares = []
    for index in (0, 2, 4, 6):
        whole = seen_by(net, x, index)
        values = torch.linalg.svdvals(whole - whole.mean(0)).square()
        shares += [(float(share), str(index)) for share in (values / values.sum())[:8]]
    best = [name for _, name in sorted(shares, reverse=True)[:16]]
    found.attach(net)
    assert ranks(net) == {name: best.count(name) for name in ("0", "2", "4", "6")}
    assert sum(ranks(net).values()) == 16
    assert len(set(ranks(net).values())) > 1


@pytest.mark.parametrize("size", [256, 64])
def test_ranks_and_initial_values_are_those_of_peft_on_the_same_batches(size: int) -> None:
    net, batches = mlp(), inputs().split(size)
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["0", "2", "4", "6"], init_lora_weights="eva", eva_config=peft.EvaConfig()
    )
    theirs = peft.get_peft_model(copy.deepcopy(net), settings, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(
        theirs,
        batches,
        forward_fn=nn.Module.__call__,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    lora.eva(net, LoRAConfig(rank=4, alpha=8, init="eva"), batches).attach(net)
    for weight in lora.adapted_weights(net):
        layer = theirs.base_model.model.get_submodule(weight.name)
        expected = layer.lora_A["default"].weight
        assert len(expected) == weight.rank
        assert layer.scaling["default"] == weight.adapter.scaling == 2
        cosines = (weight.adapter.lora_A * expected).sum(1)  # PEFT stops before the last batches
        torch.testing.assert_close(cosines, torch.ones(weight.rank), atol=1e-4 if size == 256 else 0.06, rtol=0)


@pytest.mark.parametrize("settings", [{"alpha": 6}, {"alpha": 6, "use_rslora": True}, {"alpha_pattern": {"2": 3}}])
def test_scales_stay_those_of_the_configuration(settings: dict[str, object]) -> None:
    config = LoRAConfig(**{"rank": 4, "init": "eva"} | settings)  # type: ignore[arg-type]
    net = mlp()
    lora.eva(net, config, [inputs()]).attach(net)
    for weight in lora.adapted_weights(net):
        assert weight.adapter.scaling == pytest.approx(config.scaling_of(weight.name))


def test_untrained_adapters_change_no_bit_and_start_from_the_components() -> None:
    net, x = mlp(), inputs()
    before, found = net(x), lora.eva(net, CONFIG, [x])
    found.attach(net)
    assert torch.equal(net(x), before)
    for weight in lora.adapted_weights(net):
        assert torch.equal(weight.adapter.lora_A, found.vectors[weight.name])


def test_a_layer_whose_inputs_are_all_the_same_gets_no_adapter() -> None:
    net = nn.Sequential(nn.Linear(40, 16), nn.Hardtanh(50, 60), nn.Linear(16, 8))
    found = lora.eva(net, LoRAConfig(rank=2, init="eva"), [inputs()])
    found.attach(net)
    assert ranks(net) == {"0": 4}


class Norms(nn.Module):
    """A network with random numbers and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(40, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 8))
        self.net[1].eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_modes_random_states_and_statistics_are_bitwise_as_before() -> None:
    net, x = Norms(), inputs(64)
    before, modes, numbers = state(net), [child.training for child in net.modules()], torch.get_rng_state()
    first, second = (lora.eva(net, CONFIG, x.split(16)) for _ in range(2))
    assert same(state(net), before)
    assert [child.training for child in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), numbers)
    assert same(first.vectors, second.vectors)
    assert first.config == second.config


def test_large_layers_are_decomposed_without_random_numbers_and_nearly_exactly() -> None:
    net = nn.Sequential(nn.Linear(300, 300))
    x = torch.randn(600, 300) @ torch.diag(0.9 ** torch.arange(300))
    numbers = torch.get_rng_state()
    found = lora.eva(net, CONFIG, [x])
    assert torch.equal(torch.get_rng_state(), numbers)
    _, _, expected = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close((found.vectors["0"] * expected[:4]).sum(1).abs(), torch.ones(4), atol=1e-4, rtol=0)


def test_convolutions_keep_their_rank_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 8), nn.Linear(8, 8))
    found = lora.eva(net, LoRAConfig(rank=2, init="eva"), [torch.randn(32, 1, 8, 8)])
    assert "keep their rank and get a random A: 0." in caplog.text
    found.attach(net)
    assert ranks(net)["0"] == 2
    assert sum(ranks(net).values()) == 6


def test_padding_is_left_out() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(inputs_embeds)

    net, x = Tokens(), torch.randn(8, 6, 16)
    mask = (torch.arange(6) < torch.randint(2, 6, (8, 1))).long()
    found = lora.eva(net, CONFIG, [{"inputs_embeds": x, "attention_mask": mask}])
    alone = lora.eva(net, CONFIG, [x[mask.bool()]], net.layer)
    torch.testing.assert_close(found.vectors["layer"], alone.vectors["layer"])


def test_attach_alone_says_that_batches_are_needed() -> None:
    with pytest.raises(ValueError, match=r"use lora.eva\(module, config, batches\)"):
        lora.attach(mlp(), CONFIG)
    with pytest.raises(ValueError, match="there are no batches"):
        lora.eva(mlp(), CONFIG, [])


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"alpha": 3}])
def test_peft_reads_its_folders(settings: dict[str, object], tmp_path: Path) -> None:
    config = LoRAConfig(**{"rank": 4, "init": "eva"} | settings)  # type: ignore[arg-type]
    net, x = mlp(), inputs(8)
    plain = copy.deepcopy(net)
    lora.eva(net, config, [inputs()]).attach(net)
    stir(net)
    save_adapter(net, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(theirs(x), net(x))
