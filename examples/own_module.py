"""A LightningModule and data as you may have them, on batches that are dicts: put your own in their place."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader


class OwnModule(LightningModule):
    """A small transformer that says which of three tokens a sequence has most of."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 32)
        self.encoder = nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=64, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of shape (B, 3) from tokens of shape (B, T)."""
        return self.head(self.encoder(self.embedding(tokens)).mean(1))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self(batch["tokens"]), batch["label"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the loss."""
        self.log("val/loss", self.training_step(batch, batch_idx))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the loss."""
        self.log("test/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of what is trained."""
        return torch.optim.AdamW([each for each in self.parameters() if each.requires_grad], lr=3e-3)


class OwnData(LightningDataModule):
    """Random sequences of 15 tokens, each with the token that it has most of."""

    def setup(self, stage: str) -> None:
        """Draw the sequences."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(3, (1000, 15), generator=generator)
        labels = F.one_hot(tokens, 3).sum(1).argmax(1)
        self.samples = [{"tokens": each, "label": label} for each, label in zip(tokens, labels, strict=True)]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return 600 of them, shuffled."""
        return DataLoader(self.samples[:600], batch_size=20, shuffle=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        """Return 200 others."""
        return DataLoader(self.samples[600:800], batch_size=100)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the last 200."""
        return DataLoader(self.samples[800:], batch_size=100)  # type: ignore[arg-type]
