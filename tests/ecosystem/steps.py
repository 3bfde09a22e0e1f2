"""What the scripts for the libraries share: two commands, `fit` and `load`, and what each has to show.

`load` runs in a fresh process in which `lora_lightning` cannot be imported, as on the machine of someone who only has
the library.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

if TYPE_CHECKING:
    from lora_lightning import LoRAFinetuning

TOLERANCE = 1e-5
"""Of the largest prediction: W + s B A in one matrix rounds differently than W and s B A side by side."""


class Last(Callback):
    """Keeps the state of the model at the end of `fit`, before the library does more with it."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state = copy_of(pl_module.state_dict())


@dataclass
class Run:
    """What a script did with its library.

    Args:
        callback: The callback of the fine-tuning.
        base: The state of the base before it.
        last: Its last state.
        base_predictions: Predictions of the base.
        predictions: Predictions of the adapted model, on the same inputs.
    """

    callback: LoRAFinetuning
    base: Mapping[str, Any]
    last: Last
    base_predictions: Any
    predictions: Any

    def check(self) -> None:
        """Check that the adapters were trained and written, and that the base is as it was."""
        folder = Path(str(self.callback.adapter_folder))
        assert (folder / "adapter_config.json").is_file(), folder
        assert (folder / "adapter_model.safetensors").is_file(), folder
        trained = [key for key, value in self.last.state.items() if key.endswith("lora_B") and value.any()]
        assert trained, "no adapter was trained"
        changed = [key for key, value in self.base.items() if not torch.equal(value, self.last.state[key])]
        assert not changed, changed
        effect = distance(self.predictions, self.base_predictions)
        assert effect > 100 * TOLERANCE, effect
        print(f"adapters trained: {len(trained)}; base bitwise unchanged: {len(self.base)} tensors; folder: {folder}")
        print(f"predictions differ from those of the base by {effect:.1e} of the largest one")


def copy_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the tensors of a state dict."""
    return {key: value.clone() for key, value in state.items() if isinstance(value, torch.Tensor)}


def distance(first: Any, second: Any) -> float:
    """Return the largest difference of two arrays in terms of the largest value of the second one."""
    one, other = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    assert one.shape == other.shape, (one.shape, other.shape)
    return float(abs(one - other).max() / abs(other).max())


def main(fit: Callable[[Path], Run], load: Callable[[Path], Mapping[str, Any]], *packages: str) -> None:
    """Run the command that the words after the script name: `fit FOLDER`, then `load FOLDER`.

    Args:
        fit: Trains a base, fine-tunes it, and saves it below a folder in the library's own ways.
        load: Reads what was saved, and returns the predictions by the way it was saved.
        packages: Names of the packages whose versions are printed.
    """
    command, folder = sys.argv[1], Path(sys.argv[2])
    if command == "fit":
        print(", ".join(f"{name} {version(name)}" for name in (*packages, "torch", "lightning")))
        run = fit(folder)
        run.check()
        np.save(folder / "predictions.npy", run.predictions)
        return
    sys.modules["lora_lightning"] = None  # type: ignore[assignment] # an import of it raises ImportError
    for way, predictions in load(folder).items():
        difference = distance(predictions, np.load(folder / "predictions.npy"))
        print(f"{way}: predictions differ by {difference:.1e} of the largest one")
        assert difference < TOLERANCE
