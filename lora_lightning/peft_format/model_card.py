"""Writes the README.md of an adapter folder as a model card for the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from torch import nn

import lora_lightning
from lora_lightning.wording import some_of

CARD_NAME = "README.md"


def base_name(module: nn.Module) -> str | None:
    """Return the hub name or folder of the base, which models of the transformers library store."""
    names = (vars(child).get("name_or_path") for child in module.modules())
    return next((name for name in names if isinstance(name, str) and name), None)


def model_card(
    description: Mapping[str, Any],
    parameters: int,
    data: str | None = None,
    metrics: Mapping[str, float] | None = None,
    beside: Sequence[str] = (),
) -> str:
    """Return the text of a model card (https://huggingface.co/docs/hub/model-cards).

    Args:
        description: The content of `adapter_config.json`.
        parameters: Number of parameters of the adapters.
        data: Name of the data that `metrics` were measured on.
        metrics: Metrics for the `model-index` of the card, by name.
        beside: Names of the frozen adapters that these were trained beside.
    """
    own = description["peft_type"] != "LORA"
    base = description["base_model_name_or_path"]
    header: dict[str, Any] = {"library_name": "lora-lightning" if own else "peft", "tags": ["lora", "lightning"]}
    if base:
        header["base_model"] = base
    if metrics:
        results = {
            "task": {"type": "other"},
            "dataset": {"type": "other", "name": data or "unknown"},
            "metrics": [{"type": name, "value": round(value, 6), "name": name} for name, value in metrics.items()],
        }
        header["model-index"] = [{"name": "adapter", "results": [results]}]
    layers = description["target_modules"]
    listed = f"`{layers}`" if isinstance(layers, str) else some_of(f"`{name}`" for name in layers)
    load = "from lora_lightning import load_adapter\n\nload_adapter(base, folder)"
    if not own:
        load = f"import peft\n\nmodel = peft.PeftModel.from_pretrained(base, folder)\n```\n\nor\n\n```python\n{load}"
    lines = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n",
        f"# LoRA adapter{f' of {base}' if base else ''}\n",
        f"- Rank {description['r']}, alpha {description['lora_alpha']:g}, {parameters:,} parameters.",
        f"- Layers: {listed or 'see `adapter_config.json`'}.",
        *([f"- Trained beside {_named(beside)}: use it together with them."] if beside else []),
        *(f"- {name}: {value:.4g}" for name, value in (metrics or {}).items()),
        f"- Written by lora-lightning {lora_lightning.__version__}.\n",
        f"```python\n{load}\n```\n",
    ]
    return "\n".join(lines)


def _named(adapters: Sequence[str]) -> str:
    names = [f"`{name}`" for name in adapters]
    if len(names) == 1:
        return f"the adapters {names[0]}, which stayed frozen"
    return f"the adapters {', '.join(names[:-1])} and {names[-1]}, which stayed frozen"
