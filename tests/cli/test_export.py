"""`lora-lightning export`: a trained model as an ONNX file that gives the same logits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lora_lightning import RichBoyNet, load_adapter
from lora_lightning.cli.export import export
from lora_lightning.evaluation import tensors_of

Run = Callable[..., tuple[int, str]]
MNIST = ("--data.source", "sample")
TEXTS = ["where is my card", "what is the rate", "lost", "please top up my money"]

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # of the exporter's own modules


def session_of(path: str) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def logits_of(session: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    [found] = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(found)


@pytest.fixture
def trained(run: Run, a_base_with_adapters: Path) -> Run:
    """A base and adapters, trained for a few steps."""
    return run


def test_base_and_adapters_are_exported_from_a_checkpoint_or_a_folder(trained: Run) -> None:
    adapt, pretrain = (("export", "--config", f"configs/{name}.yaml", *MNIST) for name in ("adapt", "pretrain"))
    for words in (
        (*pretrain, "--ckpt_path", "logs/pretrain", "--output", "base.onnx"),
        (*adapt, "--ckpt_path", "logs/adapt", "--output", "checkpoint.onnx"),
        (*adapt, "--adapter", "logs/adapt"),
        (*adapt, "--adapter", "logs/adapt"),
    ):
        code, output = trained(*words)
        assert code == 0, output
        assert "its outputs agree with PyTorch" in output
    net, images = RichBoyNet(), torch.randn(3, 1, 28, 28)
    state = torch.load(next(Path("logs/pretrain").rglob("*.ckpt")), weights_only=True)["state_dict"]
    net.load_state_dict({key.removeprefix("backbone."): value for key, value in state.items() if "backbone" in key})
    base = net(images)
    load_adapter(net, next(Path("logs/adapt").rglob("adapter")))
    adapted = net(images)
    assert not torch.allclose(base, adapted, atol=1e-3)
    expected = {"base": base, "checkpoint": adapted, "model": adapted, "model-v1": adapted}
    assert {path.stem for path in Path().glob("*.onnx")} == set(expected)
    for name, logits in expected.items():
        found = logits_of(session_of(f"{name}.onnx"), {"input": images})
        torch.testing.assert_close(found, logits.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_texts_of_any_length_are_tokenized_outside(run: Run, workspace: Path, tiny_bert: str) -> None:
    rows = [f"{text},{'card' if 'card' in text else 'other'}" for text in TEXTS * 5]
    Path("mine.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    words = ("--config", "configs/text.yaml", "--model.backbone.name", tiny_bert, "--data.train", "mine.csv")
    words += ("--data.test", "mine.csv", "--data.label_column", "label")
    short = ("--trainer.max_steps", "3", "--trainer.log_every_n_steps", "1", "--data.batch_size", "4")
    code, output = run("fit", *words, *short)
    assert code == 0, output
    code, output = run("export", *words, "--ckpt_path", "logs/text")
    assert code == 0, output
    session, tokenizer = session_of("model.onnx"), AutoTokenizer.from_pretrained(tiny_bert)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == ["card", "other"]
    assert tiny_bert in metadata["preprocessing"]
    assert "16 tokens" in metadata["preprocessing"]
    together = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert {entry.name for entry in session.get_inputs()} == set(together)
    batch = logits_of(session, together)
    for text, logits in zip(TEXTS, batch, strict=True):
        alone = logits_of(session, tokenizer([text], return_tensors="pt"))
        torch.testing.assert_close(alone[0], logits, rtol=1e-4, atol=1e-4)


class WholeBatch(LightningModule):
    """A module of a user with dict batches, whose `forward` gets the batch as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"features": batch["x"], "logits": self.net(batch["x"]) * batch["scale"][:, None]}


class ByKeyword(WholeBatch):
    def forward(  # type: ignore[override]
        self, x: Tensor, scale: Tensor, label: Tensor | None = None
    ) -> dict[str, Tensor]:
        return super().forward({"x": x, "scale": scale})


class NeedsTargets(WholeBatch):
    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().forward(batch) | {"loss": batch["label"].float()}


class ReturnsNames(WholeBatch):
    def forward(self, batch: dict[str, Tensor]) -> dict[str, str]:  # type: ignore[override]
        return dict.fromkeys(batch, "cat")


class Dicts(LightningDataModule):
    """Batches with inputs and targets in one dictionary."""

    def test_dataloader(self) -> DataLoader[Any]:
        rows = zip(torch.randn(6, 4), torch.rand(6), torch.arange(6) % 3, strict=True)
        return DataLoader([{"x": x, "scale": scale, "label": label} for x, scale, label in rows], batch_size=3)


@pytest.mark.parametrize("kind", [WholeBatch, ByKeyword])
def test_a_module_of_ones_own_with_dict_batches(kind: type[WholeBatch], tmp_path: Path) -> None:
    module, trainer = kind(), Trainer(accelerator="cpu", logger=False)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "base.ckpt")
    path = export(trainer, module, Dicts(), str(tmp_path / "base.ckpt"), tmp_path / "model.onnx")
    session = session_of(str(path))
    assert [entry.name for entry in session.get_inputs()] == ["x", "scale"]
    x, scale = torch.randn(5, 4), torch.rand(5)
    expected = module.net(x) * scale[:, None]
    torch.testing.assert_close(logits_of(session, {"x": x, "scale": scale}), expected.detach())


class OneInput(WholeBatch):
    """A module whose step calls `self(batch["signal"])`."""

    def forward(self, values: Tensor) -> Tensor:  # type: ignore[override]
        return self.net(values)


class Further(LightningDataModule):
    """Batches with entries that no model gets."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def test_dataloader(self) -> DataLoader[Any]:
        samples = [{self.key: torch.randn(4), "scale": torch.rand(()), "name": "a", "label": 1} for _ in range(4)]
        samples = [{key: each[key] for key in each if key != "scale" or self.key == "x"} for each in samples]
        return DataLoader(samples, batch_size=4)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "key", "names"), [(OneInput, "signal", ["input"]), (ByKeyword, "x", ["x", "scale"])])
def test_entries_of_a_batch_that_forward_does_not_take_are_left_out(
    kind: type[WholeBatch], key: str, names: list[str], tmp_path: Path
) -> None:
    module, trainer = kind(), Trainer(accelerator="cpu", logger=False)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "base.ckpt")
    path = export(trainer, module, Further(key), str(tmp_path / "base.ckpt"), tmp_path / "model.onnx")
    session = session_of(str(path))
    assert [entry.name for entry in session.get_inputs()] == names
    inputs = {"input": torch.randn(5, 4), "x": torch.randn(5, 4), "scale": torch.rand(5)}
    given = {name: inputs[name] for name in names}
    expected = module(*given.values())
    found = logits_of(session, given)
    torch.testing.assert_close(found, next(iter(tensors_of(expected))).detach(), rtol=1e-4, atol=1e-4)


def test_weights_in_a_separate_file_are_moved_with_their_model_and_overwrite_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch writes them to a separate file if they have more than 2 GB, as pretended here."""
    save = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", lambda program, path: save(program, path, external_data=True))
    module, trainer, path = WholeBatch(), Trainer(accelerator="cpu", logger=False), tmp_path / "new" / "model.onnx"
    torch.save({"state_dict": module.state_dict()}, tmp_path / "base.ckpt")
    export(trainer, module, Dicts(), str(tmp_path / "base.ckpt"), path)
    assert {file.name for file in path.parent.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert session_of(str(path)).get_inputs()
    path.unlink()
    weights = (path.parent / "model.onnx.data").read_bytes()
    with pytest.raises(FileExistsError, match=r"model.onnx.data exists: it is not overwritten"):
        export(trainer, module, Dicts(), str(tmp_path / "base.ckpt"), path)
    assert [(file.name, file.read_bytes()) for file in path.parent.iterdir()] == [("model.onnx.data", weights)]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            NeedsTargets,
            r"fails for the input \{x: \(2, 4\), scale: \(2,\)\}: KeyError: 'label'. Set example_input_array",
        ),
        (ReturnsNames, r"forward of ReturnsNames returned no tensor; expected logits"),
    ],
)
def test_a_forward_that_cannot_be_exported_is_named(kind: type[WholeBatch], message: str, tmp_path: Path) -> None:
    module, trainer = kind(), Trainer(accelerator="cpu", logger=False)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "base.ckpt")
    with pytest.raises(ValueError, match=message):
        export(trainer, module, Dicts(), str(tmp_path / "base.ckpt"), tmp_path / "model.onnx")
    assert not list(tmp_path.glob("*.onnx"))


def test_a_missing_package_is_named_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    trainer = Trainer(accelerator="cpu", logger=False)
    with pytest.raises(ValueError, match=r"ONNX needs the package onnxscript: pip install 'lora-lightning\[onnx\]'"):
        export(trainer, WholeBatch(), Dicts(), "not-there.ckpt", tmp_path / "model.onnx")


def test_what_is_missing_is_named_and_nothing_is_overwritten(trained: Run) -> None:
    for config in ("pretrain", "adapt"):
        code, output = trained("export", "--config", f"configs/{config}.yaml", *MNIST)
        assert code == 1
        assert "export needs --ckpt_path" in output
    Path("mine.onnx").write_text("mine")
    words = ("--config", "configs/pretrain.yaml", *MNIST, "--ckpt_path", "logs/pretrain", "--output", "mine.onnx")
    code, output = trained("export", *words)
    assert code == 1
    assert "mine.onnx exists: it is not overwritten" in output
    assert Path("mine.onnx").read_text() == "mine"
