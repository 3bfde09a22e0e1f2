"""A base of bitsandbytes' quantized layers: 4 bits (QLoRA) and 8 bits."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_lightning import load_adapter, save_adapter
from lora_lightning.lora import (
    LoRAConfig,
    adapter_parameters,
    attach,
    base_fingerprint,
    detach,
    disabled,
    merge,
    merged,
    verify_adapters,
)
from lora_lightning.lora.packed import keep_packing

bnb = pytest.importorskip("bitsandbytes", reason="the extra bitsandbytes is not installed")

# How each kind of layer is made, and how far its own rounding of what it multiplies is from the dense product.
KINDS = {
    "nf4": (lambda i, o: bnb.nn.Linear4bit(i, o, compute_dtype=torch.float32, quant_type="nf4"), 1e-5),
    "fp4 in bfloat16": (lambda i, o: bnb.nn.Linear4bit(i, o, compute_dtype=torch.bfloat16), 2e-2),
    "int8": (lambda i, o: bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False), 2e-2),
    "int8 with outliers": (lambda i, o: bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False, threshold=6.0), 2e-2),
}
VARIANTS = {
    "lora": LoRAConfig(rank=4, alpha=8, dropout=0.1),
    "dora": LoRAConfig(rank=4, use_dora=True),
    "pissa": LoRAConfig(rank=4, init="pissa"),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return quantized(kind)


def quantized(kind: str) -> nn.Module:
    """A network of this kind. Evaluating it does not change how its weights are packed, before it is adapted either."""
    make = KINDS[kind][0]
    net = nn.Sequential(make(64, 32), nn.ReLU(), make(32, 16)).to("cpu")  # which quantizes
    for layer in (net[0], net[2]):
        layer.support_avx512bf16_for_cpu = False
    return net


def train(net: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.Adam(adapter_parameters(net), lr=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        (net(x) - 1).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_adapters_train_over_a_base_that_stays_bitwise(base: nn.Module, config: LoRAConfig, kind: str) -> None:
    x = torch.randn(8, 64)
    expected = base.eval()(x)  # in which 4-bit layers convert their biases
    digest = base_fingerprint(base)
    assert attach(base, config) == ["0", "2"]
    assert torch.equal(base(x), expected)
    verify_adapters(base, x)
    train(base.train(), x)
    assert base_fingerprint(base) == digest
    adapted = base.eval()(x)
    assert (adapted - 1).square().sum() < 0.95 * (expected - 1).square().sum()
    with disabled(base):
        assert torch.equal(base(x), expected)
    for copied in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        assert torch.equal(copied(x), adapted)
    with merged(base):
        torch.testing.assert_close(base(x), adapted, rtol=0, atol=KINDS[kind][1])
    assert torch.equal(base(x), adapted)
    detach(base)
    assert base_fingerprint(base) == digest
    assert torch.equal(base(x), expected)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_merging_makes_plain_layers_that_save_and_load(base: nn.Module, config: LoRAConfig, kind: str) -> None:
    x = torch.randn(8, 64)
    base(x)
    attach(base, config)
    train(base, x)
    adapted = base.eval()(x)
    calls: list[str] = []
    base[0].register_forward_hook(lambda *_: calls.append("0"))
    with pytest.warns(UserWarning, match="weights of 0, 2 were quantized and are dense after merging"):
        merge(base)
    assert [type(base[0]), type(base[2])] == [nn.Linear, nn.Linear]
    torch.testing.assert_close(base(x), adapted, rtol=0, atol=KINDS[kind][1])
    assert calls == ["0"]
    plain = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    plain.load_state_dict(base.state_dict())
    assert torch.equal(plain(x), base(x))


def test_a_folder_brings_the_adapters_back(base: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(8, 64)
    attach(base, LoRAConfig(rank=4))
    train(base, x)
    adapted = base(x)
    save_adapter(base, tmp_path / "adapter")
    detach(base)
    load_adapter(base, tmp_path / "adapter", strict=True)
    assert torch.equal(base(x), adapted)


def test_peft_computes_the_same_over_four_bits(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = quantized("nf4")
    other = copy.deepcopy(base)
    x = torch.randn(8, 64)
    attach(base, LoRAConfig(rank=4))
    train(base, x)
    save_adapter(base, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(other, tmp_path / "adapter")
    torch.testing.assert_close(theirs(x), base(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("nested", [False, True])
def test_evaluating_on_a_cpu_with_bfloat16_does_not_repack_weights(nested: bool) -> None:
    net = nn.Sequential(four_bits(nested), nn.ReLU(), four_bits(nested)).to("cpu")
    for layer in (net[0], net[2]):
        layer.support_avx512bf16_for_cpu = True  # as bitsandbytes finds out on such a CPU
    digest, x = base_fingerprint(net), torch.randn(8, 256)
    attach(net, LoRAConfig(rank=4, target_modules=["2"]))
    keep_packing(net)  # for the layer without adapters
    trained = net.train()(x)
    with torch.no_grad():
        assert torch.equal(net.eval()(x), trained)
    assert base_fingerprint(net) == digest
    train(net.train(), x)


@pytest.mark.parametrize(("nested", "rounding"), [(False, 2**-8), (True, 0.02)])
def test_a_layer_that_was_repacked_before_is_adapted_with_rounded_scales(nested: bool, rounding: float) -> None:
    torch.manual_seed(0)
    layer = four_bits(nested).to("cpu")
    layer.support_avx512bf16_for_cpu = True
    dense = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    attach(layer, LoRAConfig(rank=4))
    product = layer(torch.eye(256)).detach().t()
    torch.testing.assert_close(product, dense, rtol=rounding, atol=1e-6)


def four_bits(nested: bool) -> nn.Module:
    """A layer with four scales per row, also nested ones."""
    return bnb.nn.Linear4bit(
        256, 256, compute_dtype=torch.float32, compress_statistics=nested, quant_type="nf4", bias=False
    )


def test_biases_are_trained_in_full_and_a_bias_of_b_is_refused(base: nn.Module, kind: str) -> None:
    tolerance, x = KINDS[kind][1], torch.randn(5, 64)
    y = base(x)  # which converts the biases of 4-bit layers
    original = base[0].bias.clone()
    with pytest.raises(ValueError, match="is quantized by bitsandbytes, which lora_bias=True does not support"):
        attach(base, LoRAConfig(rank=2, lora_bias=True))
    attach(base, LoRAConfig(rank=2, bias="lora_only"))
    torch.testing.assert_close(base(x), y, rtol=tolerance, atol=tolerance)
    train(base, x)
    assert not torch.equal(base[0].bias, original)
    trained = base(x)
    other = copy.deepcopy(base)
    with pytest.warns(UserWarning, match="were quantized and are dense"):
        merge(other)
    torch.testing.assert_close(other(x), trained, rtol=5 * tolerance, atol=5 * tolerance)
    detach(base)
    assert torch.equal(base[0].bias, original)
    assert torch.equal(base(x), y)


def test_merging_keeps_hooks_of_every_kind_and_what_was_trainable(base: nn.Module) -> None:
    layer, calls = base[0], list[str]()

    def note(name: str) -> Callable[..., None]:
        def hook(*arguments: object) -> None:
            calls.append(f"{name} {len(arguments)}")

        return hook

    layer.bias.requires_grad_(True)
    attach(base, LoRAConfig(rank=2))
    layer.register_forward_pre_hook(note("before"))
    layer.register_forward_pre_hook(note("before with keywords"), with_kwargs=True)
    layer.register_forward_hook(note("after"))
    layer.register_forward_hook(note("after with keywords"), with_kwargs=True)
    layer.register_full_backward_hook(note("backward"))
    with pytest.warns(UserWarning, match="were quantized and are dense"):
        merge(base)
    assert layer.bias.requires_grad
    base(torch.randn(3, 64, requires_grad=True)).sum().backward()
    assert calls == ["before 2", "before with keywords 3", "after 3", "after with keywords 4", "backward 3"]
