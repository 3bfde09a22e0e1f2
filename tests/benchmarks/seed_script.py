"""The seed protocol as a plain PyTorch script: per-sample transforms, a loop over batches, a weight parametrization.

It is what one writes without this project: torchvision's data set with its transforms, Adam as it comes, counts by a
loop over the samples. The steps are those of `configs/notebook`: pretrain, test, adapt to one digit, test.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST


class Net(nn.Module):
    """784-1000-2000-10."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(28 * 28, 1000)
        self.linear2 = nn.Linear(1000, 2000)
        self.linear3 = nn.Linear(2000, 10)
        self.relu = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        x = images.view(-1, 28 * 28)
        x = self.relu(self.linear1(x))
        x = self.relu(self.linear2(x))
        return self.linear3(x)


class LowRank(nn.Module):
    """W + s B A, with a switch."""

    def __init__(self, rows: int, columns: int, rank: int = 1, alpha: float = 1) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(rank, columns))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank))
        nn.init.normal_(self.lora_A, mean=0, std=1)
        self.scale = alpha / rank
        self.enabled = True

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        return weight + torch.matmul(self.lora_B, self.lora_A).view(weight.shape) * self.scale


def train(net: nn.Module, loader: DataLoader, limit: int | None = None) -> None:
    """One epoch of Adam 1e-3, or `limit` batches of it."""
    loss_function = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.001)
    net.train()
    for number, (images, digits) in enumerate(loader):
        if number == limit:
            break
        optimizer.zero_grad()
        loss = loss_function(net(images), digits)
        loss.backward()
        optimizer.step()


def test(net: nn.Module, loader: DataLoader) -> list[int]:
    """Errors of each digit."""
    wrong = [0] * 10
    with torch.no_grad():
        for images, digits in loader:
            logits = net(images)
            for index, row in enumerate(logits):
                if torch.argmax(row) != digits[index]:
                    wrong[digits[index]] += 1
    return wrong


def run(data_dir: Path, digit: int = 9) -> dict[str, float]:
    """Seconds of each part."""
    torch.manual_seed(0)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    training_set = MNIST(data_dir, train=True, transform=transform)
    train_loader = DataLoader(training_set, batch_size=10, shuffle=True)
    test_loader = DataLoader(MNIST(data_dir, train=False, transform=transform), batch_size=10)
    net = Net()
    seconds: dict[str, float] = {}

    began = time.perf_counter()
    train(net, train_loader)
    seconds["pretrain"] = time.perf_counter() - began

    began = time.perf_counter()
    test(net, test_loader)
    seconds["test base"] = time.perf_counter() - began

    began = time.perf_counter()
    for layer in (net.linear1, net.linear2, net.linear3):
        parametrize.register_parametrization(layer, "weight", LowRank(*layer.weight.shape))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora" in name)
    chosen = training_set.targets == digit
    training_set.data, training_set.targets = training_set.data[chosen], training_set.targets[chosen]
    train(net, DataLoader(training_set, batch_size=10, shuffle=True), limit=100)
    seconds["adapt"] = time.perf_counter() - began

    began = time.perf_counter()
    test(net, test_loader)
    for layer in (net.linear1, net.linear2, net.linear3):
        layer.parametrizations["weight"][0].enabled = False
    test(net, test_loader)
    seconds["test base and adapted"] = time.perf_counter() - began
    return seconds
