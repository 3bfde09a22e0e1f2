"""`configs/ants_bees.yaml` on made-up photographs and a small network: the real ones are not shipped."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
from PIL import Image


def test_a_network_from_a_function_of_one_s_own_gets_adapters_and_a_head_trained_in_full(
    workspace: Path, run: Callable[..., tuple[int, str]], small_efficientnet: None
) -> None:
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
