"""Training steps on a GPU: `python -m tests.benchmarks.cuda`, of an MLP, two vision transformers and a language model.

All methods have PyTorch's fused AdamW, and bfloat16 weights. The weights of the MLP are in float32, and so are those in
mixed precision, where the steps are under autocast. PEFT's adapters are in float32, as ours are, or in the dtype of the
base (`autocast_adapter_dtype=False`). The floor is the forward pass and the gradients of the inputs through the frozen
network, with neither adapters nor optimizer. The methods take turns; times are medians by CUDA events, and a ratio is
the median of the ratios within the same turn. A captured step is one CUDA graph of forward pass, backward pass and
optimizer, and shows the GPU's part of a step: Python and the launches of kernels cost nothing there. In compiled steps,
`torch.compile` compiles each block of the network. Compiled and captured rows are relative to the floor and the PEFT of
their kind. Memory is the peak that an eager or compiled method allocates by itself: weights, optimizer and activations.
Utilisation counts the multiplications that a method cannot do without (three forward passes' worth for full training,
two for adapters) against the card's peak for dense bfloat16.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich import get_console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lora_lightning import RichBoyNet
from tests.benchmarks.steps import Step, attached

TURNS, RANK, WARM_UP = 10, 8, 3
PEAK = 989e12  # H100 and H200 SXM, dense bfloat16
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def run(names: list[str] | None = None) -> tuple[Table, Any]:
    """Measure the networks of these names, or all."""
    table = Table(
        title=f"A training step on {torch.cuda.get_device_name()}, PyTorch {torch.__version__}", title_justify="left"
    )
    for column in ("network", "method", "ms", "a second", "peak GB", "MFU %", "x floor", "x PEFT", "x in base's"):
        table.add_column(column, justify="left" if column in ("network", "method") else "right")
    numbers: dict[str, Any] = {}
    for name, (make, compiles) in NETWORKS.items():
        if names and name not in names:
            continue
        torch.manual_seed(0)
        net, inputs, targets, loss, units, what = make()
        measured = _measure(net.cuda(), inputs.cuda(), targets.cuda(), loss, compiles)
        numbers[name] = measured
        for method, found in measured.items():
            table.add_row(
                name,
                method,
                f"{found['milliseconds']:.2f}",
                f"{units / found['milliseconds'] * 1e3:,.0f} {what}",
                f"{found['peak'] / 1e9:.2f}",
                f"{100 * found['flops'] / (found['milliseconds'] / 1e3) / PEAK:.0f}",
                f"{found['x floor']:.2f}",
                f"{found['x PEFT']:.2f}",
                f"{found['x in base']:.2f}",
            )
        torch.cuda.empty_cache()
    return table, numbers


def _measure(
    net: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss, compiled: bool
) -> dict[str, dict[str, float]]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(inputs)
    forward = counter.get_total_flops()
    steps: dict[str, Step] = {}
    found: dict[str, dict[str, float]] = {}
    for name, compiles in [(name, False) for name in METHODS] + [(name, True) for name in METHODS if compiled]:
        make, passes = METHODS[name]
        key = name + ", compiled" * compiles
        before = torch.cuda.memory_allocated()
        made = make(copy.deepcopy(net))
        if compiles:
            _compile_blocks(made)
        step = steps[key] = (_floor if name == "floor" else _training)(made, inputs, targets, loss)
        step()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(WARM_UP):
            step()
        torch.cuda.synchronize()
        found[key] = {"peak": torch.cuda.max_memory_allocated() - before, "flops": passes * forward}
    pool = torch.cuda.graph_pool_handle()
    for name in list(steps):
        steps[f"{name}, captured"] = _captured(steps[name], pool)
        found[f"{name}, captured"] = {"peak": math.nan, "flops": found[name]["flops"]}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(TURNS):
        order = list(steps)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            taken[name].append(_milliseconds(steps[name]))
    for name, times in taken.items():
        found[name]["milliseconds"] = statistics.median(times)
        kind = ", compiled" * ("compiled" in name) + ", captured" * ("captured" in name)
        others = {"x floor": f"floor{kind}", "x PEFT": f"PEFT{kind}", "x in base": f"PEFT, base's dtype{kind}"}
        for key, other in others.items():
            pairs = zip(times, taken[other], strict=True)
            found[name][key] = statistics.median(a / b for a, b in pairs)
    return found


def _captured(step: Step, pool: Any) -> Step:
    """Return a step that replays the kernels of `step` as one CUDA graph.

    All graphs share the memory of their activations.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay


def _milliseconds(step: Step) -> float:
    """Return the mean time of one to five steps, as many as take a tenth of a second.

    One step before them is not counted.
    """
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    step()
    ended.record()
    torch.cuda.synchronize()
    repeats = max(1, min(5, int(100 / began.elapsed_time(ended))))
    began.record()
    for _ in range(repeats):
        step()
    ended.record()
    torch.cuda.synchronize()
    return float(began.elapsed_time(ended)) / repeats


def _training(net: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss) -> Step:
    optimizer = torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad], lr=1e-4, fused=True, capturable=True
    )
    net.train()

    def step() -> None:
        optimizer.zero_grad()
        loss(net, inputs, targets).backward()
        optimizer.step()

    return step


def _floor(net: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss) -> Step:
    net.requires_grad_(False).train()
    inputs = inputs.clone().requires_grad_()

    def step() -> None:
        inputs.grad = None
        loss(net, inputs, targets).backward()

    return step


def _targets(net: nn.Module) -> list[str]:
    """Return the names of all linear layers; of the transformers but the head."""
    names = [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear)]
    return names if isinstance(net, RichBoyNet) else [name for name in names if "head" not in name]


def _with_ours(net: nn.Module) -> nn.Module:
    return attached(net, RANK, _targets(net))


def _with_peft(net: nn.Module, in_float32: bool = True) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=_targets(net))
    return peft.get_peft_model(net, config, autocast_adapter_dtype=in_float32)


METHODS: dict[str, tuple[Callable[[nn.Module], nn.Module], int]] = {  # and the passes that it cannot do without
    "full": (lambda net: net, 3),
    "PEFT": (_with_peft, 2),
    "PEFT, base's dtype": (lambda net: _with_peft(net, False), 2),
    "ours": (_with_ours, 2),
    "floor": (lambda net: net, 2),
}


def _compile_blocks(net: nn.Module) -> None:
    """Compile each block in place. Blocks of the same kind share what is compiled for the first."""
    torch._dynamo.config.recompile_limit = 64  # of a block's code, which all methods share
    for stack in [each for each in net.modules() if isinstance(each, nn.ModuleList | nn.Sequential) and len(each) > 3]:
        for block in stack:
            block.compile()


class _Decoder(nn.Module):
    """A Llama of transformers from hidden states to logits, so that its floor has an input to differentiate."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=32,
        )
        self.llama = transformers.LlamaModel._from_config(config, dtype=torch.bfloat16)
        self.lm_head = nn.Linear(2048, 32000, bias=False, dtype=torch.bfloat16)

    def forward(self, states: Tensor) -> Tensor:
        """Return logits of shape (B, T, V) from states of shape (B, T, H)."""
        return self.lm_head(self.llama(inputs_embeds=states, use_cache=False).last_hidden_state)


def _in_mixed_precision(net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):  # a CUDA graph must not keep what was cast before
        return _classes(net, inputs, targets)


def _classes(net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(net(inputs).float(), targets)


def _tokens(net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(net(inputs).flatten(0, 1).float(), targets.flatten())


def _mlp(batch: int) -> Any:
    return RichBoyNet(), torch.randn(batch, 1, 28, 28), torch.randint(10, (batch,)), _classes, batch, "images"


def _vit(name: str, batch: int, **options: Any) -> Any:
    import timm

    net = timm.create_model(name, **options).bfloat16()
    images = torch.randn(batch, 3, 224, 224, dtype=torch.bfloat16)
    return net, images, torch.randint(1000, (batch,)), _classes, batch, "images"


def _mixed(batch: int) -> Any:
    import timm

    images = torch.randn(batch, 3, 224, 224)
    net = timm.create_model("vit_base_patch16_224")
    return net, images, torch.randint(1000, (batch,)), _in_mixed_precision, batch, "images"


def _llama() -> Any:
    states = torch.randn(1, 2048, 2048, dtype=torch.bfloat16)
    with torch.device("cuda"):  # drawing a billion weights takes a CPU a minute
        net = _Decoder(22)
    return net, states, torch.randint(32000, (1, 2048)), _tokens, 2048, "tokens"


# What makes each, and whether it is compiled too.
NETWORKS: dict[str, tuple[Callable[[], Any], bool]] = {
    "RichBoyNet, batch 64": (lambda: _mlp(64), False),
    "ViT-B/16, batch 32": (lambda: _vit("vit_base_patch16_224", 32), True),
    "ViT-B/16, batch 32, bf16-mixed": (lambda: _mixed(32), False),
    "ViT-B/16, batch 128": (lambda: _vit("vit_base_patch16_224", 128), False),
    "ViT-L/16, batch 32": (lambda: _vit("vit_large_patch16_224", 32), False),
    "ViT-L/16, batch 128": (lambda: _vit("vit_large_patch16_224", 128), True),
    "Llama 1.1 B, 2,048 tokens": (_llama, True),
}


if __name__ == "__main__":
    get_console().print(run(sys.argv[1:])[0])
