"""Describes what `fit` trained, for a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Protocol

from lightning.pytorch import LightningModule, Trainer

from lora_lightning.callbacks.log_folder import log_folder
from lora_lightning.callbacks.summary import in_words, stage_metrics, trained_and_total
from lora_lightning.lora import adapted_weights


class Finetuning(Protocol):
    """Knows what the end of `fit` wrote and checked."""

    @property
    def adapter_folder(self) -> Path | str | None:
        """Return the folder of the adapters, if any."""

    @property
    def base_in_words(self) -> str:
        """Return what is known about the base."""


@dataclass(frozen=True)
class TrainedModel:
    """Describes what the last `fit` trained.

    Args:
        name: Class of the module.
        trained: Number of trained parameters.
        total: Number of all parameters.
        layers: Names of the adapted weights.
        adapters: Names of the active adapters, and which of them are frozen, if there are several.
        epochs: Number of epochs.
        metrics: Metrics of the last validation.
        folder: The log folder, or an empty string.
        finetuning: The callback that attached adapters, if any.
    """

    name: str
    trained: int
    total: int
    layers: tuple[str, ...]
    adapters: tuple[str, ...]
    epochs: int
    metrics: dict[str, float]
    folder: str
    finetuning: Finetuning | None

    @classmethod
    def of(cls, trainer: Trainer, pl_module: LightningModule, finetuning: Finetuning | None) -> TrainedModel:
        """Describe the module of a trainer at the end of `fit`. Every device has to call this."""
        found = adapted_weights(pl_module)
        adapters = {weight.adapter_name: "" if weight.is_trained else " (frozen)" for weight in found}
        return cls(
            type(pl_module).__name__,
            *trained_and_total(pl_module),
            tuple(dict.fromkeys(weight.name for weight in found)),
            tuple(name + state for name, state in adapters.items()) if len(adapters) > 1 else (),
            trainer.current_epoch,
            stage_metrics(trainer, "val"),
            log_folder(trainer) or "",
            finetuning,
        )

    def facts(self) -> dict[str, str]:
        """Return what is known, by name."""
        names = ", ".join(self.adapters) + " " * bool(self.adapters)
        found = {
            "trained": in_words(self.trained, self.total),
            "adapters": f"{names}on {len(self.layers)} weights: {', '.join(self.layers[:5])}" if self.layers else "",
            "epochs": f"{self.epochs:,}",
            "validation": ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items()),
            "folder": self.folder,
        }
        if len(self.layers) > 5:
            found["adapters"] += f" and {len(self.layers) - 5} more"
        if self.finetuning is not None:
            # The callback may write them after this description was made.
            found["adapter"] = str(self.finetuning.adapter_folder or "")
            found["base"] = self.finetuning.base_in_words
        return {name: value for name, value in found.items() if value}

    def __str__(self) -> str:
        return "\n".join([self.name, *(f"{name:<11}{value}" for name, value in self.facts().items())])

    def _repr_html_(self) -> str:
        """Return a table for a notebook."""
        rows = "".join(
            f'<tr><th scope="row" style="text-align: left">{escape(name)}</th>'
            f'<td style="text-align: left">{escape(value)}</td></tr>'
            for name, value in self.facts().items()
        )
        return f"<table><caption>{escape(self.name)}: what was trained</caption><tbody>{rows}</tbody></table>"
