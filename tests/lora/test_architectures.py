"""48 architectures of the transformers library, as PEFT's `all-linear` adapts them.

The tests run with `pytest -m slow tests/lora/test_architectures.py`.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from lora_lightning import LoRAConfig, load_adapter, save_adapter
from lora_lightning.lora import adapter_parameters, adapter_state_dict, attach, base_fingerprint, merge
from tests.lora.architectures import ARCHITECTURES, all_linear, inputs, make

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


def adapt_train_merge_and_reload(name: str, folder: Path) -> tuple[int, str]:
    """Returns how many layers were adapted, and which kind of folder was written."""
    base, batch = make(name), inputs(name)
    digest = base_fingerprint(base)
    net = copy.deepcopy(base).train()
    names = attach(net, LoRAConfig(rank=8, alpha=32, dropout=0.1))
    assert sorted(names) == all_linear(base)
    optimizer = torch.optim.AdamW(adapter_parameters(net), lr=1e-2)
    for _ in range(3):
        net(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(value.any() for key, value in adapter_state_dict(net).items() if key.endswith("lora_B"))
    assert base_fingerprint(net) == digest
    with torch.no_grad():
        logits = net.eval()(**batch).logits
        save_adapter(net, folder)
        again = copy.deepcopy(base).eval()
        load_adapter(again, folder, strict=True)
        assert torch.equal(again(**batch).logits, logits)
        kind = (folder / "adapter_config.json").read_text()
        if '"peft_type": "LORA"' in kind:
            peft = pytest.importorskip("peft")
            other = peft.PeftModel.from_pretrained(copy.deepcopy(base).eval(), folder)
            torch.testing.assert_close(other(**batch).logits, logits, rtol=1e-4, atol=1e-5)
        merge(net)
        torch.testing.assert_close(net(**batch).logits, logits, rtol=1e-3, atol=1e-4)
    return len(names), "PEFT's" if '"peft_type": "LORA"' in kind else "refused by PEFT"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_adapted_trained_merged_and_reloaded(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    layers, _ = adapt_train_merge_and_reload(name, tmp_path / "adapter")
    assert layers


def test_there_are_48() -> None:
    assert len(ARCHITECTURES) == 48
