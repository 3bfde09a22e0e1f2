"""What works on 48 architectures of the transformers library, here and with PEFT."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from tests.lora.architectures import ARCHITECTURES, inputs, make
from tests.lora.test_architectures import adapt_train_merge_and_reload


def run() -> tuple[Table, list[dict[str, Any]]]:
    """Adapt each architecture in PEFT's `all-linear` set with r 8, alpha 32, dropout 0.1.

    It is trained, merged and reloaded here.
    """
    warnings.simplefilter("ignore")
    table = Table(title="Architectures", title_justify="left")
    for column in ("architecture", "layers", "trained, merged, reloaded here", "folder", "PEFT takes a step"):
        table.add_column(column)
    numbers: list[dict[str, Any]] = []
    for name in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                layers, kind = adapt_train_merge_and_reload(name, Path(folder) / "adapter")
                here = "yes"
            except Exception as error:  # noqa: BLE001 - whatever it is goes into the table
                layers, kind, here = 0, "", f"{type(error).__name__}: {error}"
        peft = _step_of_peft(name)
        numbers.append({"architecture": name, "layers": layers, "here": here, "folder": kind, "PEFT": peft})
        table.add_row(name, str(layers), here[:60], kind, peft[:60])
    worked = {key: sum(row[key] == "yes" for row in numbers) for key in ("here", "PEFT")}
    table.add_row("sum", "", f"{worked['here']} of {len(numbers)}", "", f"{worked['PEFT']} of {len(numbers)}")
    return table, numbers


def _step_of_peft(name: str) -> str:
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear")
    try:
        net = peft.get_peft_model(make(name).train(), config)
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
        net(**inputs(name)).loss.backward()
        optimizer.step()
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "yes"
