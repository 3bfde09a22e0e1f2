"""The first ten minutes: three scripts of at most 12 lines, as a new user writes them, each in a folder of its own."""

from __future__ import annotations

import runpy
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import processes
from tests.conftest import ROOT

SCRIPTS = ROOT / "examples" / "ten_minutes"
OWN = """
import torch
from lightning import LightningModule
from transformers import BertConfig, BertForSequenceClassification

class Own(LightningModule):
    def __init__(self):
        super().__init__()
        config = BertConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
        self.net = BertForSequenceClassification(config)

    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss

    def test_step(self, batch, batch_idx):
        self.net(**batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

ids, labels = torch.randint(3, 64, (8, 6)), torch.arange(8) % 2
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
batches = torch.utils.data.DataLoader([batch], batch_size=None)
"""


@pytest.mark.parametrize("process", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["here", "process"])
@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_a_new_user_s_script_runs_and_leaves_a_page(
    script: Path, process: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = script.read_text()
    assert len(code.splitlines()) <= 12
    # Without a network: the digits in the package, random weights, and a module and photographs that are made up.
    code = code.replace("MNISTDataModule(focus=[9]", "MNISTDataModule(source='sample', focus=[9]")
    code = code.replace("MNISTDataModule()", "MNISTDataModule(source='sample')").replace('"IMAGENET1K_V1"', "None")
    code = code.replace("max_epochs=5", "max_epochs=2")
    (tmp_path / "script.py").write_text(code)
    (tmp_path / "own.py").write_text(OWN)
    for level, name in enumerate(("cats", "dogs")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(6):
            pixels = np.full((40, 50, 3), 60 + 100 * level + number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.jpg")
    if process:
        printed = processes.run("script.py", folder=tmp_path)
    else:
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "own", raising=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in a script, where they end nothing
            runpy.run_path("script.py", run_name="__main__")
        printed = capsys.readouterr().out
    assert "errors" in printed
    assert "before" in printed
    folder = tmp_path / "lightning_logs"
    pages = list(folder.rglob("report*.html"))
    assert any("McNemar" in page.read_text() for page in pages)
    assert list(folder.rglob("adapter_model.safetensors"))
