"""`lora-lightning repair --config`: models and data of the user's own."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_lightning.cli.configured_repair import Configured
from lora_lightning.repair.training import Runs

Run = Callable[..., tuple[int, str]]

TEXTS = """
model:
  class_path: lora_lightning.Classifier
  init_args:
    backbone: {class_path: lora_lightning.text_backbone, init_args: {name: BERT}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.02}}
data:
  class_path: lora_lightning.TextDataModule
  init_args: {train: train.csv, test: test.csv, batch_size: 8, val_fraction: 0.3}
trainer:
  max_epochs: 2
  log_every_n_steps: 5
  callbacks:
    - class_path: ModelCheckpoint
    - {class_path: lora_lightning.LoRAFinetuning, init_args: {rank: 2, alpha: 4}}
"""
SHORT = ("--steps", "12", "--share", "0.3", "--rank", "2", "--accelerator", "cpu")


@pytest.fixture
def texts(workspace: Path, tiny_bert: str) -> Path:
    words = ["lost", "top", "up", "please", "help", "is", "what", "my", "new", "where", "how"]
    kinds = ("card", "money", "rate")
    lines = [f"{words[row % 11]} {words[row % 7]} {kinds[row % 3]},{kinds[row % 3]}" for row in range(180)]
    Path("train.csv").write_text("\n".join(["text,label", *lines[:120]]))
    Path("test.csv").write_text("\n".join(["text,label", *lines[120:]]))
    path = Path("texts.yaml")
    path.write_text(TEXTS.replace("BERT", tiny_bert))
    return path


def result(text: str) -> str:
    found = re.search(
        r"4\. Verdict: (repaired|improved|traded|not repaired|no repair found|fewer errors, within chance)", text
    )
    assert found, text
    return found[1]


def test_a_classifier_of_texts_is_trained_repaired_and_compared_with_its_baselines(run: Run, texts: Path) -> None:
    code, text = run("repair", "--config", str(texts), *SHORT, "--focus", "money", "--baselines", "true")
    assert code == {"repaired": 0, "improved": 0, "traded": 3, "fewer errors, within chance": 5}.get(result(text), 4)
    assert "2. Weak class: money (as asked)" in text
    assert "12 steps with 30% of each batch from money" in text
    (logs,) = Path("logs/repair").iterdir()
    base = torch.load(logs / "base" / "base.ckpt", weights_only=True)["state_dict"]
    assert not [key for key in base if "lora" in key]
    rows = {row["name"]: row for row in json.loads((logs / "baselines.json").read_text())["rows"]}
    assert len(rows) == 8
    assert rows["last layer, focus"]["parameters"] < rows["full network, focus"]["parameters"]
    if re.search("^adapter  ", text, re.MULTILINE):
        assert "Base bitwise unchanged: yes" in text
        config = json.loads((logs / "adapter" / "adapter_config.json").read_text())
        assert (config["r"], config["modules_to_save"]) == (2, None)  # the head is the base's
        (words,) = re.findall(r"^next +lora-lightning (.*)$", text, re.MULTILINE)
        code, text = run(*shlex.split(words))
        assert code == 0, text


def test_a_run_of_adapters_is_a_base_with_these_folded_in(run: Run, texts: Path) -> None:
    code, text = run("fit", "--config", str(texts), "--trainer.accelerator", "cpu")
    assert code == 0, text
    words = ("--base_checkpoint", "lightning_logs", "--data.val_fraction", "0.4")
    code, text = run("repair", "--config", str(texts), *words, *SHORT)
    result(text)
    (logs,) = Path("logs/repair").iterdir()
    assert (logs / "base" / "base.ckpt").is_file()
    assert "on 48 validation samples" in text


def test_adapters_of_a_repair_train_as_configured_and_the_full_network_at_a_tenth_of_their_rate(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["lora-lightning"])
    callback = "{class_path: lora_lightning.LoRAFinetuning, init_args: {rank: 2, alpha: 4"
    texts.write_text(texts.read_text().replace(f"{callback}}}}}", f"{callback}, dropout: 0.1}}}}"))
    task = Configured(["--config", str(texts), "--model.lr_ratio", "16"], seed=0)
    assert task.model().lr_ratio == 16
    ours = task.adapters(8, Path("base.ckpt"))
    assert (ours.config.rank, ours.config.alpha, ours.config.dropout) == (8, 16, 0.1)
    rates = {
        method: task.model(method).optimizer([torch.nn.Parameter(torch.ones(1))]).param_groups[0]["lr"]
        for method in ("adapters", "last layer", "full network")
    }
    assert rates == {"adapters": 0.02, "last layer": 0.02, "full network": pytest.approx(0.002)}


@pytest.mark.slow
def test_photographs_in_class_folders_are_repaired(run: Run, workspace: Path) -> None:
    for level, name in enumerate(("cats", "dogs", "owls")):
        Path("photos", name).mkdir(parents=True)
        for number in range(12):
            pixels = np.full((40, 50, 3), 40 + 70 * level + 3 * number, np.uint8)
            Image.fromarray(pixels).save(Path("photos", name, f"{number}.png"))
    options = ["--data.root", "photos", "--model.backbone.weights", "null", "--data.num_workers", "0"]
    options += [
        "--data.val_fraction",
        "0.25",
        "--data.test_fraction",
        "0.25",
        "--trainer.max_epochs",
        "1",
        "--trainer.log_every_n_steps",
        "1",
        "--data.batch_size",
        "4",
    ]
    options += ["--data.preprocessing", "torchvision.transforms._presets.ImageClassification"]
    options += ["--data.preprocessing.crop_size", "32", "--data.preprocessing.resize_size", "32"]
    code, text = run("repair", "--config", "configs/images.yaml", *options, "--focus", "worst-pair", "--steps", "2")
    assert code in (0, 3, 4), text
    result(text)
    assert re.search(r"2\. Weak class: (cats|dogs) and (dogs|owls) \(taken for each other", text), text


@pytest.mark.slow  # the classifier of texts above goes the same way
def test_digits_by_a_configuration_are_repaired(run: Run, workspace: Path) -> None:
    words = ("--config", "configs/pretrain.yaml", "--data.source", "sample", "--trainer.max_epochs", "1")
    code, text = run("repair", *words, "--focus", "9", "--steps", "20")
    assert code in (0, 3, 4), text
    assert "20 steps with 20% of each batch from 9" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.test", "null"], "The test samples are the validation samples"),
        (["--data.val_fraction", "0"], "no validation data"),
        (["--focus", "loan"], "focus='loan': 'loan' is not a class: expected card, money, rate"),
        (["--base_checkpoint", "nowhere"], "nowhere does not exist"),
        (["--source", "sample"], "source='sample', data_dir='data': the configuration defines the data"),
        (["--data.train", "nowhere.csv"], "nowhere.csv"),
        (["--data.trian", "train.csv"], "trian"),
        (["--data", "lightning.pytorch.demos.boring_classes.BoringDataModule"], "BoringDataModule"),
        (["--model", "lightning.pytorch.demos.boring_classes.BoringModel"], "BoringModel"),
    ],
)
def test_what_can_t_be_repaired_is_said_before_any_training(
    run: Run, texts: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr(Runs, "train", lambda *_: pytest.fail("it trains"))
    code, text = run("repair", "--config", str(texts), *words)
    assert code in (1, 2)
    assert message in text


def test_an_option_of_a_configuration_that_is_not_given_is_an_error(run: Run, workspace: Path) -> None:
    code, text = run("repair", "--data.root", "photos")
    assert code == 1
    assert "--data.root changes a configuration, but there is none: add --config." in text
