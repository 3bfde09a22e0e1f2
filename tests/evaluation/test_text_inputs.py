"""A report shifts the targets of a model that predicts the following token, and of no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_lightning import ComparisonReport, ConfusionReport, LoRAConfig
from lora_lightning.evaluation import Confusion
from lora_lightning.lora import attach

VOCABULARY = 12
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


class Own(nn.Module):
    """A user's causal model, which returns logits of shape (B, L, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).cumsum(1))


class Texts(LightningModule):
    """A user's module."""

    def __init__(self, net: nn.Module, step: Callable[[nn.Module, dict[str, Tensor]], Any]) -> None:
        super().__init__()
        self.net, self.step = net, step

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.step(self.net, batch)


def whole(net: nn.Module, batch: dict[str, Tensor]) -> Any:
    return net(**batch)


def ids_alone(net: nn.Module, batch: dict[str, Tensor]) -> Any:
    return net(batch["input_ids"])


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2))


def bert(kind: str) -> Callable[[], nn.Module]:
    config = transformers.BertConfig(**SMALL, num_labels=VOCABULARY)
    return lambda: getattr(transformers, kind)(config)


def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, decoder_start_token_id=0))


TEXTS = torch.randint(1, VOCABULARY, (10, 9), generator=torch.Generator().manual_seed(0))
PROMPT = TEXTS.masked_fill(torch.arange(9) < 4, -100)


@pytest.mark.parametrize(
    ("make", "step", "batch", "shifted"),
    [
        (llama, whole, {"input_ids": TEXTS, "labels": TEXTS}, True),
        (llama, whole, {"input_ids": TEXTS, "labels": PROMPT}, True),
        (llama, ids_alone, {"input_ids": TEXTS, "labels": TEXTS}, True),
        (llama, ids_alone, {"input_ids": TEXTS[:, :-1], "labels": TEXTS[:, 1:]}, False),
        (Own, ids_alone, {"input_ids": TEXTS, "labels": TEXTS}, True),
        (Own, ids_alone, {"input_ids": TEXTS[:, :-1], "labels": TEXTS[:, 1:]}, False),
        (bert("BertForMaskedLM"), whole, {"input_ids": TEXTS, "labels": TEXTS}, False),
        (bert("BertForTokenClassification"), whole, {"input_ids": TEXTS, "labels": TEXTS.flip(0)}, False),
        (t5, whole, {"input_ids": TEXTS, "labels": TEXTS}, False),
    ],
)
@pytest.mark.parametrize("size", [1, 10])
def test_the_following_token_is_compared_where_the_model_predicts_it(
    make_trainer: Callable[..., Trainer], make: Any, step: Any, batch: dict[str, Tensor], shifted: bool, size: int
) -> None:
    torch.manual_seed(0)
    net = make().eval()
    attach(net, LoRAConfig(rank=2))
    rows = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    loader = DataLoader(rows, batch_size=size)
    make_trainer(report := ConfusionReport(verbose=False), logger=False).test(Texts(net, step), loader, verbose=False)
    with torch.no_grad():
        output = step(net, batch)
    predicted = (output if isinstance(output, Tensor) else output.logits).argmax(2)
    targets = batch["labels"]
    if shifted:
        predicted, targets = predicted[:, :-1], targets[:, 1:]
    matrix = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.int64)
    for target, token in zip(targets[targets >= 0], predicted[targets >= 0], strict=True):
        matrix[target, token] += 1
    assert report.report is not None
    assert report.report.task == ("next_tokens" if shifted else "tokens")
    for result in (report.report.adapted, report.report.base):
        assert isinstance(result, Confusion)
        assert torch.equal(result.matrix, matrix)


def test_labels_of_texts_are_no_classes_of_tokens(make_trainer: Callable[..., Trainer]) -> None:
    config = transformers.BertConfig(**SMALL, num_labels=4, problem_type="multi_label_classification")
    labels = torch.randint(2, (10, 4), generator=torch.Generator().manual_seed(1)).float()
    rows = [{"input_ids": text, "labels": each} for text, each in zip(TEXTS, labels, strict=True)]
    net = transformers.BertForSequenceClassification(config)
    make_trainer(report := ComparisonReport(verbose=False), logger=False).test(
        Texts(net, whole), DataLoader(rows, batch_size=3), verbose=False
    )
    assert report.report is not None
    assert report.report.read_as == "labels: 4, from outputs (B, 4) and float targets (B, 4), all 0 or 1"
