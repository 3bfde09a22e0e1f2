"""One adapter for each expert of a parameter of three dimensions, in Python and in PEFT's folders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from lora_lightning import load_adapter, save_adapter
from lora_lightning.lora import (
    LoRAConfig,
    adapted_weights,
    adapter_parameters,
    add_weighted_adapter,
    attach,
    detach,
    disabled,
    extract_adapter,
    merge,
    merged,
    verify_adapters,
)
from lora_lightning.lora.adapter import Adapter
from lora_lightning.lora.selection import select
from tests.helpers import stir
from tests.lora.architectures import make

pytestmark = [
    # PEFT 0.21 asks transformers 5.24 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT compares the keys with modules alone:
    # https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/tuners_utils.py
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]
NAMES = ["experts.gate_up_proj", "experts.down_proj"]


class Experts(nn.Module):
    """Asks for its parameter once for each expert, as the transformers library does."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.weight = nn.Parameter(torch.randn(4, 3, 5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        each = [self.weight[expert] for expert in range(4)]
        return torch.stack([x @ (weight if self.is_transposed else weight.T) for weight in each])


CONFIG = LoRAConfig(rank=2, alpha=3, target_modules=[], target_parameters=["weight"])


def oracle(net: Experts) -> Tensor:
    """W + s B A, one expert after the other."""
    (each,) = adapted_weights(net)
    a, b = each.factors
    assert (a.shape, b.shape) == (((2, 4, 3), (5, 2, 4)) if net.is_transposed else ((2, 4, 5), (3, 2, 4)))
    changes = [b[:, :, expert] @ a[:, expert] * 1.5 for expert in range(4)]
    return net._parameters["weight"] + torch.stack([each.T if net.is_transposed else each for each in changes])


@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_has_a_matrix_of_its_own(transposed: bool) -> None:
    net, x = Experts(transposed), torch.randn(6, 3 if transposed else 5, dtype=torch.float64)
    before, plain = copy.deepcopy(net.state_dict()), net(x)
    attach(net, CONFIG)
    assert torch.equal(net(x), plain)
    stir(net, 0.3)
    other = Experts(transposed)
    other.weight = nn.Parameter(oracle(net).detach().clone())
    y, target = net(x), other(x)
    torch.testing.assert_close(y, target)
    dense = oracle(net)
    expected = torch.stack([x @ (dense[each] if transposed else dense[each].T) for each in range(4)])
    upstream = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, adapter_parameters(net), upstream),
        torch.autograd.grad(expected, adapter_parameters(net), upstream),
    )
    verify_adapters(net, x)
    with disabled(net):
        assert torch.equal(net(x), plain)
    with merged(net):
        torch.testing.assert_close(net(x), target)
    copied = copy.deepcopy(net)
    merge(copied)
    torch.testing.assert_close(copied(x), target)
    detach(net)
    assert torch.equal(net(x), plain)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


def test_the_experts_are_formed_once_in_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Experts()
    attach(net, CONFIG)
    (each,) = adapted_weights(net)
    calls: list[Tensor] = []
    form = Adapter.delta_weight

    def counted(self: Adapter, weight: Tensor) -> Tensor:
        calls.append(weight)
        return form(self, weight)

    monkeypatch.setattr(Adapter, "delta_weight", counted)
    net(torch.randn(6, 5, dtype=torch.float64))
    assert len(calls) == 1
    stir(net, 0.3)  # what was formed in one pass is not kept for the next
    assert not torch.equal(net(torch.ones(1, 5, dtype=torch.float64)), torch.ones(1, 5).double() @ each.weight.mT)


def test_a_compiled_model_of_experts_is_the_same() -> None:
    net, x = Experts(), torch.randn(6, 5, dtype=torch.float64)
    attach(net, CONFIG)
    stir(net, 0.3)
    compiled = torch.compile(net, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), net(x))
        stir(net, 0.1)


def test_experts_start_as_linear_layers_do() -> None:
    net = Experts()
    torch.manual_seed(0)
    attach(net, CONFIG)
    torch.manual_seed(0)
    drawn = nn.init.kaiming_uniform_(torch.empty(8, 5, dtype=torch.float64), a=5**0.5)
    assert torch.equal(adapted_weights(net)[0].factors[0].flatten(0, 1), drawn)


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"init": "pissa"}, {"dropout": 0.1}])
def test_what_experts_can_not_have_is_refused(variant: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"'weight' (contains one matrix per expert|uses its weight directly)"):
        attach(Experts(), LoRAConfig(target_modules=[], target_parameters=["weight"], **variant))


@pytest.mark.parametrize("transposed", [False, True])
def test_adapters_of_experts_are_extracted_and_combined(transposed: bool) -> None:
    base, tuned = Experts(transposed), Experts(transposed)
    attach(tuned, CONFIG)
    tuned.load_state_dict(base.state_dict(), strict=False)
    stir(tuned, 0.3)
    adapted = copy.deepcopy(tuned)
    merge(tuned)
    left_out = extract_adapter(base, tuned, CONFIG)
    assert left_out["weight"] < 1e-9
    weight = oracle(adapted)
    attach(adapted, CONFIG, "second")
    stir(adapted, 0.3)
    second = oracle(adapted)
    add_weighted_adapter(adapted, {"default": 1.0, "second": 0.5}, "both")
    plain = adapted._parameters["weight"]
    torch.testing.assert_close(adapted.weight, plain + (weight - plain) + 0.5 * (second - plain))


GPT_OSS = transformers.GptOssConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=4,
    num_experts_per_tok=2,
)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_peft_and_we_read_each_other_s_adapters_of_experts(kind: str, tmp_path: Path) -> None:
    base = (transformers.GptOssForCausalLM(GPT_OSS) if kind == "gpt_oss" else make(kind)).eval()
    x = torch.randint(3, 60, (2, 9))
    net = copy.deepcopy(base)
    config = LoRAConfig(
        rank=2, target_modules=["q_proj"], target_parameters=NAMES, rank_pattern={"experts.down_proj": 3}
    )
    assert len(attach(net, config)) == 6
    stir(net, 0.1)
    y = net(x).logits
    assert not torch.allclose(y, base(x).logits)
    save_adapter(net, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(theirs(x).logits, y)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "ours", strict=True)
    assert torch.equal(again(x).logits, y)

    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=NAMES)
    )
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.add_(torch.randn_like(value), alpha=0.1)
    model.save_pretrained(tmp_path / "theirs")
    loaded = copy.deepcopy(base)
    assert len(load_adapter(loaded, tmp_path / "theirs")) == 6
    torch.testing.assert_close(loaded(x).logits, model(x).logits)


def test_mixtral_gets_half_a_million_numbers_and_not_a_matrix_of_all_experts() -> None:
    """One layer's `down_proj` of Mixtral 8x7B (8 experts of 14,336 -> 4,096) at rank 4 without memory for it."""
    with torch.device("meta"):
        experts = nn.Module()
        experts.down_proj = nn.Parameter(torch.empty(8, 4096, 14336))
        net = nn.ModuleDict({"experts": experts})
    (each,) = select(net, LoRAConfig(rank=4, target_modules=[], target_parameters=["down_proj"]))
    assert each.shape == (4096, 14336)
    assert 4 * 8 * sum(each.shape) == 589_824


class TwoParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(2, 6, 5))
        self.experts.down = nn.Parameter(torch.randn(2, 5, 6))


def test_a_folder_knows_nothing_of_other_adapters_of_the_same_experts(tmp_path: Path) -> None:
    net = TwoParameters()
    attach(net, LoRAConfig(rank=1, target_modules=[], target_parameters=["experts.down"]), name="other")
    attach(net, LoRAConfig(rank=1, target_modules=[], target_parameters=["experts.up"]))
    stir(net, 0.3)
    save_adapter(net, tmp_path / "adapter")
    fresh = TwoParameters()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh.experts.up, net.experts.up)
    assert torch.equal(fresh.experts.down, net.experts.down)
