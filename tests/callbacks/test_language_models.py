"""A causal language model, trained as `docs/language_models.md` does it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from lightning.pytorch import Trainer
from torch import nn

from lora_lightning import LoRAFinetuning, lora
from tests.conftest import ROOT
from tests.lora.architectures import make

MakeTrainer = Callable[..., Trainer]
OPTIONS = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def language_model() -> Any:
    """The page's own class."""
    page = (ROOT / "docs" / "language_models.md").read_text()
    (source,) = re.findall(r"class LanguageModel.*?(?=\n\n\n)", page, re.DOTALL)
    assert len(source.splitlines()) <= 30
    names: dict[str, Any] = {"torch": torch, "LightningModule": __import__("lightning").LightningModule}
    exec(source, names)  # noqa: S102 - the project's own code
    return names["LanguageModel"]


# PEFT 0.21 asks transformers 5.24 by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_generates_with_adapters_on_off_and_merged_and_as_in_peft(
    language_model: Any, make_trainer: MakeTrainer, precision: Any
) -> None:
    net = make("llama")
    base: nn.Module = copy.deepcopy(net)
    tokens = torch.randint(3, 64, (8, 12))
    batches = torch.utils.data.DataLoader([{"input_ids": tokens, "labels": tokens}], batch_size=None)
    callback = LoRAFinetuning(rank=8, alpha=32, dropout=0.1)
    make_trainer(callback, max_epochs=20, precision=precision).fit(language_model(net), batches)
    net.eval()
    base = base.eval().to(net.dtype)
    adapted = net.generate(tokens[:2, :4], **OPTIONS)
    plain = base.generate(tokens[:2, :4], **OPTIONS)
    assert not torch.equal(adapted, plain)
    with lora.disabled(net):
        assert torch.equal(net.generate(tokens[:2, :4], **OPTIONS), plain)
    if precision == "32-true":
        other = peft.PeftModel.from_pretrained(base, callback.adapter_folder)
        assert torch.equal(other.generate(tokens[:2, :4], **OPTIONS), adapted)
        lora.merge(net)
        assert torch.equal(net.generate(tokens[:2, :4], **OPTIONS), adapted)
        assert not lora.is_adapted(net.lm_head)


def test_the_page_trains_what_peft_calls_all_linear(language_model: Any, make_trainer: MakeTrainer) -> None:
    net = transformers.AutoModelForCausalLM.from_config(make("llama").config)
    tokens = torch.randint(3, 64, (2, 6))
    batches = torch.utils.data.DataLoader([{"input_ids": tokens, "labels": tokens}], batch_size=None)
    make_trainer(LoRAFinetuning(rank=2), max_epochs=1).fit(language_model(net), batches)
    assert len(lora.adapted_weights(net)) == 14
