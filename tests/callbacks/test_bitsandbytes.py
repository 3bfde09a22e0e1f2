"""`LoRAFinetuning` over layers of bitsandbytes: those of Lightning's plugin, and a user's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import BitsandbytesPrecision
from torch import nn

from lora_lightning import LoRAFinetuning
from lora_lightning.lora import adapter_state_dict, merge
from tests.callbacks.test_others_runs import MakeTrainer, Two, data, same

bnb = pytest.importorskip("bitsandbytes", reason="the extra bitsandbytes is not installed")


class Quantized(Two):
    """A module whose linear layers its own `__init__` quantizes."""

    def __init__(self) -> None:
        super().__init__()
        state = self.state_dict()
        self.body[0] = bnb.nn.Linear4bit(8, 8, compute_dtype=torch.float32, quant_type="nf4")
        self.head = bnb.nn.Linear8bitLt(8, 3, has_fp16_weights=False)
        self.load_state_dict(state)


@pytest.mark.parametrize("mode", ["nf4", "fp4-dq", "int8", "own layers"])
def test_a_quantized_base_trains_checkpoints_and_resumes(mode: str, make_trainer: MakeTrainer) -> None:
    def run(epochs: int, ckpt_path: Any = None) -> tuple[Two, Trainer]:
        torch.manual_seed(0)
        module = Quantized() if mode == "own layers" else Two()
        trainer = make_trainer(LoRAFinetuning(rank=2), max_epochs=epochs)
        if mode != "own layers":  # Trainer refuses the plugin on a CPU, where its layers work
            dtype = torch.float16 if mode == "int8" else torch.bfloat16
            trainer.strategy.precision_plugin = BitsandbytesPrecision(mode, dtype=dtype)
        trainer.fit(module, data(), data(), ckpt_path=ckpt_path)
        return module, trainer

    module, trainer = run(4)
    path = Path(trainer.checkpoint_callback.best_model_path)
    assert all(value.any() for value in adapter_state_dict(module).values())
    kept = torch.load(path, weights_only=True)["state_dict"]
    assert set(kept) == set(adapter_state_dict(module))
    tested = trainer.test(module, data(), verbose=False)
    assert trainer.test(module, data(), ckpt_path=path, verbose=False) == tested
    _, stopped = run(2)
    resumed, _ = run(4, stopped.checkpoint_callback.best_model_path)
    assert same(adapter_state_dict(resumed), adapter_state_dict(module))
    with pytest.warns(UserWarning, match="were quantized and are dense after merging"):
        merge(module)
    assert type(module.head) is nn.Linear
