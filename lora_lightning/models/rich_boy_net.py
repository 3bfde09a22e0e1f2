"""Defines `RichBoyNet`, the over-sized MLP for MNIST."""

from __future__ import annotations

from torch import Tensor, nn


class RichBoyNet(nn.Module):
    """MLP with layers 784 -> `hidden_size_1` -> `hidden_size_2` -> 10 and ReLU, far larger than MNIST needs.

    With the default sizes it has 2,807,010 parameters. Rank-1 adapters on its three layers add 6,794, or 0.242 %.

    Args:
        hidden_size_1: Width of the first hidden layer.
        hidden_size_2: Width of the second hidden layer.
    """

    def __init__(self, hidden_size_1: int = 1000, hidden_size_2: int = 2000) -> None:
        super().__init__()
        self.linear1 = nn.Linear(28 * 28, hidden_size_1)
        self.linear2 = nn.Linear(hidden_size_1, hidden_size_2)
        self.linear3 = nn.Linear(hidden_size_2, 10)
        self.relu = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape (B, 10) for images of shape (B, 1, 28, 28) or (B, 784)."""
        hidden: Tensor = self.relu(self.linear1(images.flatten(1)))
        hidden = self.relu(self.linear2(hidden))
        logits: Tensor = self.linear3(hidden)
        return logits
