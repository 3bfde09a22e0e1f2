"""The README.md of an adapter folder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import transformers
from huggingface_hub import ModelCard
from lightning.pytorch import Trainer
from torch import nn

from lora_lightning import Classifier, LoRAConfig, LoRAFinetuning, MNISTDataModule, RichBoyNet
from lora_lightning.lora import attach
from lora_lightning.peft_format import load_adapter, save_adapter


def test_the_hub_reads_the_card_and_peft_the_name_of_the_base(tiny_bert: str, tmp_path: Path) -> None:
    net = transformers.AutoModel.from_pretrained(tiny_bert)
    attach(net, LoRAConfig(rank=2))
    save_adapter(net, tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.base_model == tiny_bert
    assert card.data.library_name == "peft"
    assert "Rank 2, alpha 2" in card.text
    assert "PeftModel.from_pretrained" in card.text
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "adapter")).base_model_name_or_path == tiny_bert


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:The number of training batches")
def test_after_fit_the_card_has_what_the_last_validation_measured(
    make_trainer: Callable[..., Trainer],
) -> None:
    callback = LoRAFinetuning(rank=2)
    trainer = make_trainer(callback, max_epochs=1)
    trainer.fit(Classifier(RichBoyNet()), MNISTDataModule("sample", batch_size=64))
    (result, *others) = ModelCard.load(Path(str(callback.adapter_folder)) / "README.md").data.eval_results
    assert {each.metric_type for each in (result, *others)} == {"loss", "accuracy"}
    assert result.dataset_name == "MNISTDataModule"
    for each in (result, *others):
        assert each.metric_value == pytest.approx(float(trainer.callback_metrics[f"val/{each.metric_type}"]), abs=1e-6)


def test_a_readme_that_is_there_stays(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    attach(net, LoRAConfig(rank=2))
    (tmp_path / "README.md").write_text("mine")
    save_adapter(net, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_adapters_that_peft_cannot_read_say_what_reads_them(tmp_path: Path) -> None:
    net = nn.Sequential(nn.LSTM(4, 4))
    plain = copy.deepcopy(net)
    attach(net, LoRAConfig(rank=2))
    save_adapter(net, tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "lora-lightning"
    assert "load_adapter(base, folder)" in card.text
    assert load_adapter(plain, tmp_path)
