"""`lora-lightning merge`: adapters folded into a plain checkpoint and an ONNX file."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_lightning import RichBoyNet

Run = Callable[..., tuple[int, str]]
MERGE = ("merge", "--config", "configs/adapt.yaml", "--data.source", "sample")


@pytest.fixture
def trained(run: Run, a_base_with_adapters: Path) -> Run:
    """A base and adapters, trained for a few steps."""
    return run


def errors_of(output: str) -> str:
    """The last row of the report: all errors."""
    found = re.findall(r"│ +all │ +2,000 │([^\n]*)", output)
    return found[-1].split("│")[1 if "→" in found[-1] else 0].strip()


@pytest.mark.smoke
def test_the_merged_checkpoint_is_a_plain_model_with_the_same_errors(trained: Run) -> None:
    code, output = trained(*MERGE, "--ckpt_path", "logs/adapt", "--output", "merged.ckpt")
    assert code == 0, output
    assert "Merged: merged.ckpt" in output
    checkpoint = torch.load("merged.ckpt", weights_only=True)
    assert not any("lora" in key for key in [*checkpoint, *checkpoint["state_dict"]])
    _, adapted = trained(
        "test", "--config", "configs/adapt.yaml", "--data.source", "sample", "--ckpt_path", "logs/adapt"
    )
    _, plain = trained(
        "test", "--config", "configs/pretrain.yaml", "--data.source", "sample", "--ckpt_path", "merged.ckpt"
    )
    assert errors_of(adapted) == errors_of(plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the exporter's own modules
def test_the_onnx_file_agrees_for_batches_of_any_size(trained: Run) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    code, output = trained(*MERGE, "--ckpt_path", "logs/adapt", "--output", "merged.ckpt", "--onnx", "merged.onnx")
    assert code == 0, output
    net = RichBoyNet()
    state = torch.load("merged.ckpt", weights_only=True)["state_dict"]
    net.load_state_dict({key.removeprefix("backbone."): value for key, value in state.items()})
    session = onnxruntime.InferenceSession("merged.onnx", providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["input"]
    assert [entry.name for entry in session.get_outputs()] == ["logits"]
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == [str(digit) for digit in range(10)]
    assert "0.1307" in metadata["preprocessing"]
    for size in (1, 5):
        x = np.random.default_rng(0).normal(size=(size, 1, 28, 28)).astype(np.float32)
        [found] = session.run(None, {session.get_inputs()[0].name: x})
        torch.testing.assert_close(torch.from_numpy(found), net(torch.from_numpy(x)), rtol=1e-4, atol=1e-4)


def test_nothing_is_overwritten(trained: Run) -> None:
    Path("merged.ckpt").write_text("mine")
    code, output = trained(*MERGE, "--ckpt_path", "logs/adapt", "--output", "merged.ckpt")
    assert code == 1
    assert "merged.ckpt exists: it is not overwritten" in output
    assert Path("merged.ckpt").read_text() == "mine"
    for _ in range(2):
        code, output = trained(*MERGE, "--ckpt_path", "logs/adapt")
        assert code == 0, output
    assert {path.name for path in Path().glob("merged*")} == {"merged.ckpt", "merged-v1.ckpt", "merged-v2.ckpt"}


def test_what_is_missing_is_named(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = trained(*MERGE)
    assert code == 1
    assert "merge needs --ckpt_path, a checkpoint with adapters" in output
    code, output = trained("merge", "--config", "configs/pretrain.yaml", "--ckpt_path", "logs/adapt")
    assert code == 1
    assert "merge needs a LoRAFinetuning among trainer.callbacks" in output
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, output = trained(*MERGE, "--ckpt_path", "logs/adapt", "--onnx", "merged.onnx")
    assert code == 1
    assert "ONNX needs the package onnxruntime: pip install 'lora-lightning[onnx]'" in output
    assert not Path("merged.onnx").exists()
    assert not Path("merged.ckpt").exists()
