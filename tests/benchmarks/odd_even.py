"""An MLP that knows the odd digits of MNIST learns the even ones: loss curves, and what is forgotten.

`python -m tests.benchmarks.odd_even --figure docs/odd_even.png` prints the table and draws the curves, which are those
of PiSSA's figure 2 (arXiv 2404.02948). MNIST is in the folder LORA_LIGHTNING_DATA. All methods start from the same
network and get the same batches. Each has the learning rate, of three, with the lowest loss on 2,000 even digits that
are held out of the training data, with a seed that is not reported. The loss of a step is the mean of the last 10
training losses.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import MNIST

from lora_lightning import LoRAConfig, RichBoyNet, lora

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

_DATA = Path(os.environ.get("LORA_LIGHTNING_DATA", "data")).resolve()
_BATCH, _STEPS, _HELD_OUT = 64, 300, 2000
SEEDS, _CHOOSING_SEED = (0, 1, 2), 3
SHOWN = (10, 30, 100, 300)
_ADAPTERS = (3e-3, 1e-2, 3e-2)
METHODS = {
    "LoRA": _ADAPTERS,
    "PEFT, LoRA": _ADAPTERS,
    "PiSSA": _ADAPTERS,
    "PEFT, PiSSA": _ADAPTERS,
    "EVA": _ADAPTERS,
    "full fine-tuning": (1e-3, 3e-3, 1e-2),
    "biases": (1e-2, 3e-2, 1e-1),
    "last layer": (3e-3, 1e-2, 3e-2),
}
_RANK = 4
_LAYERS = ["linear1", "linear2", "linear3"]


class Digits(NamedTuple):
    """Images of shape (number, 784), and digits."""

    images: Tensor
    targets: Tensor

    def of_parity(self, odd: bool) -> Digits:
        """Return the odd digits, or the even ones."""
        chosen = (self.targets % 2 == 1) == odd
        return Digits(self.images[chosen], self.targets[chosen])


class Outcome(NamedTuple):
    """What a method has reached."""

    losses: list[float]
    held_out: float
    even: float
    odd: float
    seconds: float
    trained: int
    megabytes: float


def digits(train: bool) -> Digits:
    """Return a split of MNIST."""
    data = MNIST(_DATA, train=train)
    return Digits((data.data.flatten(1).float() / 255 - 0.1307) / 0.3081, data.targets)


def fit(net: nn.Module, data: Digits, steps: int, rate: float, seed: int) -> list[float]:
    """Train with Adam, and return the losses."""
    numbers = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([value for value in net.parameters() if value.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(data.targets), (_BATCH,), generator=numbers)
        loss = F.cross_entropy(net(data.images[chosen]), data.targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(net: nn.Module, data: Digits) -> float:
    """Return the accuracy in percent."""
    return 100 * (net(data.images).argmax(1) == data.targets).float().mean().item()


def prepared(net: RichBoyNet, method: str, data: Digits) -> nn.Module:
    """Return the network with what a method trains."""
    if method.startswith("PEFT"):
        init = "pissa" if method.endswith("PiSSA") else True
        return peft.get_peft_model(
            net, peft.LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=_LAYERS, init_lora_weights=init)
        )
    if method == "EVA":
        batches = data.images[: 16 * _BATCH].split(_BATCH)
        lora.eva(net, LoRAConfig(rank=_RANK, init="eva"), batches).attach(net)
    elif method in ("LoRA", "PiSSA"):
        lora.attach(net, LoRAConfig(rank=_RANK, init="pissa" if method == "PiSSA" else "kaiming"))
    else:
        for name, parameter in net.named_parameters():
            is_chosen = name.endswith("bias") if method == "biases" else name.startswith("linear3")
            parameter.requires_grad_(method == "full fine-tuning" or is_chosen)
    return net


class Bases:
    """Networks that were trained on the odd digits, by seed."""

    def __init__(self, hidden: tuple[int, int]) -> None:
        self.hidden, self.train, self.test = hidden, digits(train=True), digits(train=False)
        even = self.train.of_parity(odd=False)
        self.even = Digits(even.images[_HELD_OUT:], even.targets[_HELD_OUT:])
        self.held_out = Digits(even.images[:_HELD_OUT], even.targets[:_HELD_OUT])
        self._states: dict[int, dict[str, Tensor]] = {}

    def get(self, seed: int) -> RichBoyNet:
        """Return a network of a seed."""
        torch.manual_seed(seed)
        net = RichBoyNet(*self.hidden)
        if seed not in self._states:
            fit(net, self.train.of_parity(odd=True), 300, 1e-3, seed)
            self._states[seed] = {key: value.clone() for key, value in net.state_dict().items()}
        net.load_state_dict(self._states[seed])
        return net

    def run(self, method: str, seed: int, rate: float) -> Outcome:
        """Train and test."""
        base = self.get(seed)
        began = time.perf_counter()
        net = prepared(base, method, self.even)
        losses = fit(net, self.even, _STEPS, rate, 1000 + seed)
        seconds = time.perf_counter() - began
        trained = {name: value.detach() for name, value in net.named_parameters() if value.requires_grad}
        with torch.no_grad():
            held_out = F.cross_entropy(net(self.held_out.images), self.held_out.targets).item()
        return Outcome(
            losses,
            held_out,
            accuracy(net, self.test.of_parity(odd=False)),
            accuracy(net, self.test.of_parity(odd=True)),
            seconds,
            sum(value.numel() for value in trained.values()),
            len(safetensors.torch.save(trained)) / 1e6,
        )


def at(losses: list[float], step: int) -> float:
    """Return the mean of the last 10 losses at a step."""
    return statistics.mean(losses[max(step - 10, 0) : step])


def in_words(values: list[float], digits: int) -> str:
    """Return the median with the range."""
    low, median, high = min(values), statistics.median(values), max(values)
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def draw(path: Path, found: dict[str, list[Outcome]]) -> None:
    """Draw the median loss curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for method in ("LoRA", "PiSSA", "EVA", "full fine-tuning", "last layer"):
        curves = [[at(each.losses, step) for step in range(5, _STEPS + 1, 5)] for each in found[method]]
        axes.plot(
            range(5, _STEPS + 1, 5), [statistics.median(values) for values in zip(*curves, strict=True)], label=method
        )
    axes.set(xlabel="step", ylabel="training loss, mean of 10 steps", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print the table, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, nargs=2, default=(256, 256), help="widths of the hidden layers")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    bases, found, rates = Bases(tuple(options.hidden)), dict[str, list[Outcome]](), dict[str, float]()
    for method, candidates in METHODS.items():
        tried = {rate: bases.run(method, _CHOOSING_SEED, rate).held_out for rate in candidates}
        rates[method] = min(tried, key=tried.__getitem__)
        found[method] = [bases.run(method, seed, rates[method]) for seed in SEEDS]
        print(method, {rate: round(loss, 4) for rate, loss in tried.items()}, flush=True)
    before = in_words([accuracy(bases.get(seed), bases.test.of_parity(odd=True)) for seed in SEEDS], 1)
    table = Table(title=f"{_STEPS} steps, seeds {', '.join(map(str, SEEDS))}; odd digits before: {before} %")
    for column in (
        "",
        "rate",
        *(f"loss, step {step}" for step in SHOWN),
        "even, %",
        "odd after, %",
        "s",
        "trained",
        "MB",
    ):
        table.add_column(column)
    for method, each in found.items():
        table.add_row(
            method,
            f"{rates[method]:g}",
            *(in_words([at(outcome.losses, step) for outcome in each], 3) for step in SHOWN),
            in_words([outcome.even for outcome in each], 1),
            in_words([outcome.odd for outcome in each], 1),
            f"{statistics.median(outcome.seconds for outcome in each):.1f}",
            f"{each[0].trained:,}",
            f"{each[0].megabytes:.3f}",
        )
    Console(width=220).print(table)
    if options.figure:
        draw(options.figure, found)


if __name__ == "__main__":
    main()
