"""Peak memory of training adapters on a random Llama of 100 M parameters in bfloat16, here and in PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from rich.table import Table

from tests.benchmarks.vgg19 import peak_resident

_KINDS = ("PEFT", "ours", "ours, without verify")
_RUNS = 3


def train(kind: str) -> dict[str, float]:
    """Train two steps in this process, by Lightning, and return the peak of its memory in MB.

    The second step has the optimizer's state beside everything that the first one needs.
    """
    import torch
    import transformers
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader

    class LanguageModel(LightningModule):
        def __init__(self, net: Any) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=11,
        num_attention_heads=12,
        num_key_value_heads=12,
    )
    net = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    callbacks = []
    if kind == "PEFT":
        import peft

        net = peft.get_peft_model(
            net, peft.LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear")
        )
    else:
        from lora_lightning import LoRAFinetuning

        callbacks = [LoRAFinetuning(rank=8, alpha=32, dropout=0.1, verify=kind == "ours")]
    tokens = torch.randint(0, config.vocab_size, (2, 2, 256))
    batches = DataLoader([{"input_ids": each, "labels": each} for each in tokens], batch_size=None)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LanguageModel(net), batches)
    return {"peak": peak_resident(), "parameters": parameters}


def run() -> tuple[Table, Any]:
    """Run each kind in processes of its own, in turns."""
    peaks: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    parameters = 0.0
    for _ in range(_RUNS):
        for kind in _KINDS:
            code = f"import json; from tests.benchmarks.language_model import train; print(json.dumps(train({kind!r})))"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            peaks[kind].append(found["peak"])
            parameters = found["parameters"]
    table = Table("", "peak MB, median", "of PEFT's", title=f"Llama of {parameters / 1e6:.0f} M parameters, bfloat16")
    median = {kind: sorted(values)[_RUNS // 2] for kind, values in peaks.items()}
    for kind in _KINDS:
        table.add_row(kind, f"{median[kind]:,.0f}", f"{median[kind] / median['PEFT']:.2f}")
    return table, {"peaks": peaks, "parameters": parameters}
