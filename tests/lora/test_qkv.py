"""Query and value alone of a layer that computes query, key and value.

Such layers are timm's and SAM's `qkv`, GPT-2's `c_attn`, and those with an `in_proj_weight`.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lora_lightning import (
    Classifier,
    ConfusionReport,
    LoRAConfig,
    LoRAFinetuning,
    MNISTDataModule,
    load_adapter,
    save_adapter,
)
from lora_lightning.lora import (
    adapted_weights,
    adapter_parameters,
    add_weighted_adapter,
    attach,
    disabled,
    is_adapted,
    is_untrained,
    merge,
    set_adapter,
    verify_adapters,
)
from lora_lightning.lora.record import config_of
from tests.helpers import stir

WIDTH = 16


class Attention(nn.Module):
    """Attention as timm and SAM have it: one layer for query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(Attention(), nn.LayerNorm(WIDTH)), nn.Sequential(Attention(), nn.LayerNorm(WIDTH))
    )


def train(net: nn.Module, steps: int = 4, **optimizer: float) -> None:
    """Take steps of AdamW with weight decay.

    They change whatever has a gradient, and would change what has none and is not zero.
    """
    adam = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1, **optimizer)
    for _ in range(steps):
        adam.zero_grad()
        net(torch.randn(2, 5, WIDTH)).square().sum().backward()
        adam.step()


def rows(net: nn.Module) -> list[list[bool]]:
    """Whether the effective weight of each adapted layer differs from the base's in query, key and value."""
    return [
        [bool(change.any()) for change in each.adapter.delta_weight(each.weight).reshape(3, WIDTH, -1)]
        for each in adapted_weights(net)
    ]


@pytest.mark.parametrize(("qkv", "changed"), [("qv", [True, False, True]), ("k", [False, True, False])])
def test_the_rows_that_are_named_change_and_the_others_keep_every_bit(qkv: str, changed: list[bool]) -> None:
    net = network()
    x = torch.randn(3, 5, WIDTH)
    before, projected = net(x), net[0][0].qkv(x)
    assert attach(net, LoRAConfig(rank=4, target_modules=["qkv"], qkv=qkv)) == ["0.0.qkv", "1.0.qkv"]
    assert torch.equal(net(x), before)
    train(net)
    assert rows(net) == [changed, changed]
    after = [not torch.equal(a, b) for a, b in zip(net[0][0].qkv(x).chunk(3, -1), projected.chunk(3, -1), strict=True)]
    assert after == changed
    assert verify_adapters(net, x) is None
    with disabled(net):
        assert torch.equal(net(x), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_train_the_same_rows(copied: Callable[[nn.Module], nn.Module]) -> None:
    net = network()
    attach(net, LoRAConfig(rank=4, target_modules=["qkv"], qkv="qv"))
    other = copied(net)
    train(other)
    assert rows(other) == [[True, False, True]] * 2
    assert is_untrained(net)


def test_it_is_lora_of_query_and_value_as_layers_of_their_own() -> None:
    """The same adapters on three separate layers give the same outputs and the same gradients."""
    layer, x = nn.Linear(WIDTH, 3 * WIDTH).double(), torch.randn(7, WIDTH, dtype=torch.float64)
    net = nn.Sequential(layer)
    attach(net, LoRAConfig(rank=2, alpha=6, qkv="qv"))
    with torch.no_grad():
        net[0].lora_weight.default.lora_B.copy_(torch.randn_like(net[0].lora_weight.default.lora_B))
    a, b = (
        factor.detach().clone().requires_grad_()
        for factor in (net[0].lora_weight.default.lora_A, net[0].lora_weight.default.lora_B)
    )
    q, k, v = layer._parameters["weight"].chunk(3)
    bias = layer.bias.chunk(3)
    dense = (q + 3 * b[:WIDTH] @ a, k, v + 3 * b[2 * WIDTH :] @ a)
    expected = torch.cat([nn.functional.linear(x, w, each) for w, each in zip(dense, bias, strict=True)], -1)
    output = net(x)
    torch.testing.assert_close(output, expected)
    weights = torch.randn_like(output)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(net[0].lora_weight.default.lora_A.grad, a.grad)
    torch.testing.assert_close(net[0].lora_weight.default.lora_B.grad, b.grad)
    assert not net[0].lora_weight.default.lora_B.grad[WIDTH : 2 * WIDTH].any()


def test_attention_of_pytorch_and_gpt_2_s_layer_are_adapted_likewise() -> None:
    from transformers.pytorch_utils import Conv1D

    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    attach(attention, LoRAConfig(rank=2, target_modules=["in_proj_weight"], qkv="qv"))
    gpt = nn.ModuleDict({"c_attn": Conv1D(3 * WIDTH, WIDTH)})
    attach(gpt, LoRAConfig(rank=2, target_modules=["c_attn"], qkv="qv"))
    x = torch.randn(2, 5, WIDTH)
    for net, output in ((attention, lambda: attention(x, x, x)[0]), (gpt, lambda: gpt.c_attn(x))):
        adam = torch.optim.AdamW(adapter_parameters(net), lr=0.1)
        for _ in range(3):
            adam.zero_grad()
            output().square().sum().backward()
            adam.step()
        (each,) = adapted_weights(net)
        change = each.layout.matrix(each.adapter.delta_weight(each.weight))
        assert [bool(part.any()) for part in change.chunk(3)] == [True, False, True]


def test_a_folder_holds_it_for_peft_and_goes_on_here_with_the_same_rows(tmp_path: Path) -> None:
    import peft

    net = network()
    plain = copy.deepcopy(net)
    attach(net, LoRAConfig(rank=4, target_modules=["qkv"], qkv="qv"))
    train(net)
    save_adapter(net, tmp_path)
    x = torch.randn(2, 5, WIDTH)
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['qkv'\]"):
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    torch.testing.assert_close(loaded(x), net(x))
    load_adapter(plain, tmp_path)
    assert torch.equal(plain(x), net(x))
    train(plain)
    assert rows(plain) == [[True, False, True]] * 2


def test_adapters_are_exchanged_added_up_and_folded_in() -> None:
    net, x = network(), torch.randn(2, 5, WIDTH)
    attach(net, LoRAConfig(rank=4, target_modules=["qkv"], qkv="qv"), "first")
    train(net)
    first = net(x)
    attach(net, LoRAConfig(rank=4, target_modules=["qkv"]), "second")
    train(net)
    assert rows(net) == [[True, True, True]] * 2
    set_adapter(net, "first")
    assert torch.equal(net(x), first)
    add_weighted_adapter(net, {"first": 1.0}, "sum")
    set_adapter(net, "sum")
    torch.testing.assert_close(net(x), first)
    set_adapter(net, "first")
    key = net[0][0].qkv._parameters["weight"].chunk(3)[1].clone()
    merge(net)
    torch.testing.assert_close(net(x), first)
    assert torch.equal(net[0][0].qkv.weight.chunk(3)[1], key)


class Digits(nn.Module):
    """Rows of a digit as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(28, WIDTH), network(), nn.Linear(WIDTH, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embed(images.view(-1, 28, 28))).mean(1))


def test_a_run_of_lightning_trains_these_rows_and_resumes(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    def fit(epochs: int, checkpoint: str | None = None, **others: object) -> tuple[Classifier, Trainer]:
        torch.manual_seed(0)
        model = Classifier(Digits())
        callback = LoRAFinetuning(rank=2, target_modules=["qkv"], **({"qkv": "qv"} | others))
        trainer = make_trainer(callback, ConfusionReport(verbose=False), max_epochs=epochs, limit_train_batches=3)
        trainer.fit(model, datamodule=MNISTDataModule(source="sample", batch_size=20), ckpt_path=checkpoint)
        return model, trainer

    _, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed, _ = fit(2, str(tmp_path / "one.ckpt"))
    whole, _ = fit(2)
    assert rows(resumed.backbone) == [[True, False, True]] * 2
    for one, other in zip(adapter_parameters(resumed.backbone), adapter_parameters(whole.backbone), strict=True):
        assert torch.equal(one, other)
    for others in ({"qkv": "kv"}, {"qkv_sizes": [20, 14, 14]}):  # whose tensors have the same shapes
        with pytest.raises(ValueError, match=r"In the checkpoint: .*rank 2, scale 1, qv alone\).*; attached: .*alone"):
            fit(2, str(tmp_path / "one.ckpt"), **others)


@pytest.mark.parametrize("targets", [["qkv", "proj"], "all"])
def test_other_targets_are_adapted_as_usual(
    targets: str | list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import peft

    net, x = network(), torch.randn(2, 5, WIDTH)
    plain, before = copy.deepcopy(net), net(x)
    attach(net, LoRAConfig(rank=4, target_modules=targets, qkv="qv"))
    assert "qkv='qv' applies to 0.0.qkv, 1.0.qkv. The other targets" in caplog.text
    assert torch.equal(net(x), before)
    train(net)
    changes = {each.name: each.adapter.delta_weight(each.weight) for each in adapted_weights(net)}
    assert {name.rpartition(".")[2] for name in changes} == {"qkv", "proj"}
    for name, change in changes.items():
        kept = [bool(part.any()) for part in change.chunk(3)]
        assert kept == ([True, False, True] if name.endswith("qkv") else [True, True, True])
    save_adapter(net, tmp_path)
    loaded = copy.deepcopy(plain)
    load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(x), net(x))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['qkv'\]"):
        of_peft = peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(of_peft(x), net(x))
    train(loaded)
    kept = {
        tuple(map(bool, [part.any() for part in each.adapter.product().chunk(3)]))
        for each in adapted_weights(loaded)
        if each.name.endswith("qkv")
    }
    assert kept == {(True, False, True)}
    y = net(x)
    merge(net)
    torch.testing.assert_close(net(x), y)


def test_the_three_gates_of_a_gru_are_not_query_key_and_value() -> None:
    net = nn.ModuleDict({"gru": nn.GRU(WIDTH, WIDTH), "qkv": nn.Linear(WIDTH, 3 * WIDTH)})
    attach(net, LoRAConfig(rank=2, qkv="qv"))
    assert [type(each.adapter).__name__ for each in adapted_weights(net)] == ["Adapter", "Adapter", "QKVAdapter"]


class TestSizesOfGroupedQueryAttention:
    """Key and value have fewer outputs than the query."""

    SIZES: ClassVar = [16, 4, 8]

    @pytest.mark.parametrize("qkv", ["q", "k", "v", "qk", "qv", "kv"])
    def test_the_layer_computes_with_dense_weights_of_the_parts_that_are_named(self, qkv: str) -> None:
        """Outputs and gradients are those of W + s B A, where the other rows of B are zero."""
        layer, x = nn.Linear(WIDTH, 28).double(), torch.randn(7, WIDTH, dtype=torch.float64)
        weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
        net = nn.Sequential(layer)
        attach(net, LoRAConfig(rank=2, alpha=6, qkv=qkv, qkv_sizes=self.SIZES))
        (found,) = adapted_weights(net)
        stir(net)
        a, b = (factor.detach().clone().requires_grad_() for factor in found.factors)
        starts = {"q": 0, "k": 16, "v": 20}
        ends = {"q": 16, "k": 20, "v": 28}
        kept = torch.zeros(28, 1, dtype=torch.float64)
        for part in qkv:
            kept[starts[part] : ends[part]] = 1
        expected = nn.functional.linear(x, weight + 3 * (kept * b) @ a, bias)
        output = net(x)
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(found.factors[0].grad, a.grad)
        torch.testing.assert_close(found.factors[1].grad, b.grad)
        merge(net)
        torch.testing.assert_close(net(x), expected)
        assert torch.equal(layer.weight[kept[:, 0] == 0], weight[kept[:, 0] == 0])

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which PEFT reads
    def test_phi_3_is_adapted_merged_and_exchanged_with_peft(self, tmp_path: Path) -> None:
        import peft
        from transformers import Phi3Config, Phi3ForCausalLM

        size = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 20}
        net = Phi3ForCausalLM(
            Phi3Config(vocab_size=11, num_hidden_layers=2, pad_token_id=0, eos_token_id=1, bos_token_id=2, **size)
        ).eval()
        plain, ids = copy.deepcopy(net), torch.randint(11, (2, 5))
        attach(net, LoRAConfig(rank=2, target_modules=["qkv_proj", "o_proj"], qkv="qv", qkv_sizes=[16, 4, 4]))
        adam = torch.optim.AdamW(adapter_parameters(net), lr=0.1)
        for _ in range(3):
            adam.zero_grad()
            net(ids, labels=ids).loss.backward()
            adam.step()
        for each in adapted_weights(net):
            change = each.adapter.delta_weight(each.weight)
            if each.name.endswith("qkv_proj"):
                assert [bool(part.any()) for part in change.split([16, 4, 4])] == [True, False, True]
            else:
                assert bool(change.any(1).all())
        y = net(ids).logits
        save_adapter(net, tmp_path)
        with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['qkv', 'qkv_sizes'\]"):
            of_peft = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
        torch.testing.assert_close(of_peft(ids).logits, y)
        load_adapter(plain, tmp_path)
        assert torch.equal(plain(ids).logits, y)
        assert config_of(plain).qkv_sizes == [16, 4, 4]
        merge(net)
        torch.testing.assert_close(net(ids).logits, y)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                {},
                (
                    r"Layer '0.0.qkv' has 48 outputs: "
                    r"expected 16 \+ 4 \+ 8 = 28 for qkv_sizes=\[16, 4, 8\], in at least one"
                ),
            ),
            ({"qkv": ""}, r"qkv_sizes=\[16, 4, 8\] has no effect without qkv: say which of them to adapt, as qkv='qv'"),
            ({"qkv_sizes": [16, 4]}, r"qkv_sizes=\[16, 4\]: expected the numbers of outputs for query, key and value"),
            ({"qkv_sizes": [16, 4, 0]}, r"qkv_sizes=\[16, 4, 0\]: expected the numbers of outputs"),
            ({"qkv_sizes": [16, 4, 28.0]}, r"qkv_sizes=\[16, 4, 28.0\]: expected the numbers of outputs"),
        ],
    )
    def test_sizes_that_do_not_add_up_are_refused(self, config: dict[str, object], message: str) -> None:
        given = {"target_modules": ["qkv"], "qkv": "qv", "qkv_sizes": self.SIZES} | config
        net = network()
        with pytest.raises(ValueError, match=message):
            attach(net, LoRAConfig(**given))
        assert not is_adapted(net)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"qkv": "qkv"}, r"qkv='qkv': expected one or two of q, k, v"),
        ({"qkv": "vq"}, r"qkv='vq': expected one or two of q, k, v"),
        (
            {"qkv": "qv", "target_modules": ["proj"]},
            r"'0.0.proj' has 16 outputs and 16 inputs: expected three times as many",
        ),
        ({"qkv": "qv", "use_dora": True}, r"'0.0.qkv' cannot combine qkv='qv' with DoRA or PiSSA"),
        ({"qkv": "qv", "init": "pissa"}, r"'0.0.qkv' cannot combine qkv='qv' with DoRA or PiSSA"),
        (
            {"qkv": "qv", "target_modules": r".*(query_key_value|qkv)"},
            r"'0.0.qkv' may interleave query, key and value by head",
        ),
    ],
)
def test_what_has_no_such_rows_is_refused_by_name(config: dict[str, object], message: str) -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message):
        attach(net, LoRAConfig(**{"target_modules": ["qkv"]} | config))
    assert net.state_dict().keys() == before.keys()
