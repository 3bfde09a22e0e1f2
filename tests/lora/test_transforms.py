"""Transforms of PyTorch compute with the adapters, each of them once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from lora_lightning.lora import LoRAConfig, adapter_parameters, attach, disabled, merged, set_adapter
from tests.helpers import stir

# PyTorch's first forward-mode derivative scripts functions of its own,
# https://github.com/pytorch/pytorch/blob/v2.10.0/torch/_decomp/decompositions_for_jvp.py
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning"
)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.convolution = nn.Conv1d(6, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convolution(self.embedding(x).mT).tanh().mean(-1))


class OwnLinear(nn.Linear):
    """A class of the user's that computes as its base class."""


class DoublingLinear(nn.Linear):
    """A class of the user's that reads its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, 2 * self.weight, self.bias)


def adapted(net: nn.Module) -> nn.Module:
    attach(net.double(), LoRAConfig(rank=2, alpha=3))
    stir(net, 0.3)
    return net


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return adapted(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))


X, TANGENT = torch.randn(2, 6, 5, dtype=torch.float64)


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_agrees_with_reverse_mode(grad: bool) -> None:
    net = mlp()
    expected = torch.func.vmap(torch.func.jacrev(net))(X)
    with torch.set_grad_enabled(grad):
        y, change = torch.func.jvp(net, (X,), (TANGENT,))
        torch.testing.assert_close(y, net(X))
        torch.testing.assert_close(change, torch.einsum("boi,bi->bo", expected, TANGENT))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(net(forward_ad.make_dual(X, TANGENT)))
        torch.testing.assert_close(dual.tangent, change)
    torch.testing.assert_close(torch.func.jacfwd(net)(X[0]), expected[0])


def test_forward_mode_differentiates_by_the_adapters() -> None:
    net = mlp()
    parameters = {name: value.detach() for name, value in net.named_parameters() if "lora_" in name}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, values, (X,)).square().sum()

    directions = {name: torch.randn_like(value) for name, value in parameters.items()}
    _, change = torch.func.jvp(loss, (parameters,), (directions,))
    gradients = torch.func.grad(loss)(parameters)
    torch.testing.assert_close(change, sum((gradients[name] * directions[name]).sum() for name in parameters))


def test_forward_mode_passes_convolutions_and_embeddings() -> None:
    torch.manual_seed(0)
    net = adapted(Convolutions())
    x = torch.randint(7, (3, 8))
    parameters = {name: value.detach() for name, value in net.named_parameters() if "lora_" in name}
    jacobians = [
        transform(lambda values: torch.func.functional_call(net, values, (x,)))(parameters)
        for transform in (torch.func.jacfwd, torch.func.jacrev)
    ]
    torch.testing.assert_close(*jacobians)


def test_vmap_computes_with_a_batch_of_adapters() -> None:
    net, x = mlp(), X
    each = [value.detach() for value in adapter_parameters(net)]
    names = [name for name, value in net.named_parameters() if any(value is other for other in adapter_parameters(net))]
    many = {name: torch.stack([value, 2 * value]) for name, value in zip(names, each, strict=True)}
    outputs = torch.func.vmap(lambda values: torch.func.functional_call(net, values, (x,)))(many)
    torch.testing.assert_close(outputs[0], net(x))
    with torch.no_grad():
        for value in adapter_parameters(net):
            value *= 2
    torch.testing.assert_close(outputs[1], net(x))


@pytest.mark.parametrize("layer", [nn.Linear, OwnLinear, DoublingLinear])
def test_a_traced_network_has_each_adapter_once_and_goes_on_with_it(layer: type[nn.Linear]) -> None:
    torch.manual_seed(0)
    net = adapted(nn.Sequential(layer(5, 4), nn.Tanh(), layer(4, 3)))
    traced = torch.fx.symbolic_trace(net)
    assert torch.equal(traced(X), net(X))
    for _ in range(2):
        net.zero_grad()
        traced(X).square().sum().backward()
        assert all(parameter.grad is not None for parameter in adapter_parameters(net))
        stir(net, 0.3)
        assert torch.equal(traced(X), net(X))
    with disabled(net):
        assert torch.equal(traced(X), net(X))
    attach(net, LoRAConfig(rank=1), name="other")
    assert torch.equal(traced(X), net(X))
    set_adapter(net, "default")
    assert torch.equal(traced(X), net(X))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(5, 4), X),
        (nn.Conv1d(6, 4, 3), X),
        (nn.Embedding(7, 6), torch.tensor([1, 5])),
        (OwnLinear(5, 4), X),
    ],
)
def test_a_layer_that_is_traced_alone_is_refused_with_a_way_out(layer: nn.Module, x: Tensor) -> None:
    adapted(layer)
    with pytest.raises(RuntimeError, match=r"lora\.merged\(net\)"):
        torch.fx.symbolic_trace(layer)
    with merged(layer):
        traced = torch.fx.symbolic_trace(layer)
    torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("targets", ["all", ["layer4.0.conv1", "fc"]])
def test_features_of_an_adapted_resnet_are_extracted(targets: str | list[str]) -> None:
    torch.manual_seed(0)
    net, x = resnet18(weights=None).eval(), torch.randn(2, 3, 32, 32)
    attach(net, LoRAConfig(rank=2, target_modules=targets))
    stir(net, 0.1)
    found: dict[str, Tensor] = {}
    hook = net.layer4.register_forward_hook(lambda module, inputs, output: found.update(layer4=output))
    logits = net(x)
    hook.remove()
    extracted = create_feature_extractor(net, ["layer4", "fc"])(x)
    assert torch.equal(extracted["layer4"], found["layer4"])
    assert torch.equal(extracted["fc"], logits)
    with disabled(net):
        base = net(x)
    assert not torch.allclose(base, logits)
