"""A training step of a text classifier of MiniLM's size: full fine-tuning, PEFT and ours, with and without dropout."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import transformers
from rich.table import Table
from torch import Tensor, nn

from lora_lightning import LoRAConfig
from lora_lightning.lora import attach
from tests.benchmarks.steps import measure, peft, training_step

TURNS = 15
LAYERS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


class TextClassifier(nn.Module):
    """Random weights in the shape of all-MiniLM-L6-v2, with 77 classes."""

    def __init__(self) -> None:
        super().__init__()
        size = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        self.net = transformers.BertForSequenceClassification(transformers.BertConfig(**size, num_labels=77))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens).logits


def run() -> tuple[Table, list[dict[str, Any]]]:
    """32 texts of 16 tokens, rank 8, in turns."""
    table = Table(title="A training step on 32 texts of 16 tokens, ms", title_justify="left")
    for column in ("dropout of the adapters", "full", "PEFT", "ours", "x full", "x PEFT"):
        table.add_column(column, justify="right")
    numbers: list[dict[str, Any]] = []
    tokens, classes = torch.randint(30_000, (32, 16)), torch.randint(77, (32,))
    plain = TextClassifier()
    for dropout in (0.0, 0.1):
        nets = {each: copy.deepcopy(plain) for each in ("full", "PEFT", "ours")}
        attach(nets["ours"], LoRAConfig(rank=8, alpha=16, dropout=dropout, target_modules=LAYERS))
        settings = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=LAYERS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nets["PEFT"] = peft.get_peft_model(nets["PEFT"], settings)
        trained = {each: sum(p.numel() for p in nets[each].parameters() if p.requires_grad) for each in nets}
        assert trained["PEFT"] == trained["ours"], trained
        measured = measure({each: training_step(net, tokens, classes) for each, net in nets.items()}, TURNS)
        numbers.append({"dropout": dropout, "methods": measured})
        ms = [f"{measured[each]['milliseconds']:.1f}" for each in nets]
        table.add_row(f"{dropout:g}", *ms, *(f"{measured['ours'][each]:.2f}" for each in ("x full", "x PEFT")))
    return table, numbers
