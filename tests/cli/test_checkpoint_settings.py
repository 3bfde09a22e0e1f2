"""The hyper-parameters in a checkpoint choose no code that the configuration does not name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., tuple[int, str]]
SMALL = ("--data.source", "sample", "--trainer.max_steps", "2", "--trainer.max_epochs", "1")
TEST = ("test", "-c", "configs/pretrain.yaml", "--data.source", "sample", "--ckpt_path", "planted.ckpt")
BACKBONE = '{"class_path": "planted.Net"}'


@pytest.fixture
def plant(run: Run, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Saves a checkpoint with these hyper-parameters beside a module that creates a file when it is imported."""
    assert run("fit", "-c", "configs/pretrain.yaml", *SMALL)[0] == 0
    (checkpoint,) = Path("logs/pretrain").rglob("*.ckpt")
    monkeypatch.syspath_prepend(str(workspace))
    Path("planted.py").write_text(
        "from pathlib import Path\nfrom lora_lightning import Classifier as Model, RichBoyNet as Net\n"
        "Path('harm').touch()\ndef make(cls, *_): Path('harm').touch(); return cls()\n"
    )
    Path("planted.yaml").write_text("class_path: planted.Net")

    def save(hyper_parameters: dict[str, Any]) -> None:
        torch.save(torch.load(checkpoint) | {"hyper_parameters": hyper_parameters}, "planted.ckpt")

    return save


@pytest.mark.parametrize(
    "hyper_parameters",
    [
        {"_class_path": "planted.Model"},
        {"class_path": "planted.Model"},
        {"_class_path": "lora_lightning.Classifier", "backbone": {"class_path": "planted.Net"}},
        {"init_args": {"backbone": {"class_path": "planted.Net"}}},
        {"init_args": {"backbone": "planted.Net"}},
        {"init_args": {"backbone": BACKBONE}},
        {"init_args": {"backbone": BACKBONE.replace("class", "\\u0063lass").replace("planted", "\\u0070lanted")}},
        {"init_args": {"backbone": "planted.yaml"}},
        {"init_args": {"backbone": "./planted.yaml"}},
        {"init_args": {"backbone": "local://planted.yaml"}},
        {"init_args": {"backbone": {"class_path": "lora_lightning.RichBoyNet", "dict_kwargs": {"a": ["os.system"]}}}},
        {"init_args": {"backbone": {"class_path": "CELU"}}},
        {"init_args": {"backbone": {"class_path": "torch.nn.CELU"}}},
        BACKBONE,
    ],
    ids=str,
)
def test_hyper_parameters_name_no_code(
    run: Run, plant: Callable[[Any], None], hyper_parameters: dict[str, Any]
) -> None:
    plant(hyper_parameters)
    code, output = run(*TEST)
    assert not Path("harm").exists()
    assert code in (1, 2), output  # 2 from the parser, for what is no argument of the configured model
    assert "lora-lightning: error: " in output


@pytest.mark.parametrize("others", [{}, {"_class_path": "lora_lightning.Classifier"}])
def test_an_instantiator_is_not_called(
    run: Run, plant: Callable[[dict[str, Any]], None], others: dict[str, Any]
) -> None:
    plant({"_instantiator": "planted.make", **others})
    code, output = run(*TEST)
    assert code == 0, output
    assert not Path("harm").exists()
