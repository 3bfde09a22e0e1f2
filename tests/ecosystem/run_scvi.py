"""scvi-tools: SCVI on counts of genes, trained on in a second `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import scvi
from anndata import AnnData
from scvi.model import SCVI
from steps import Last, Run, copy_of, main


def cells() -> AnnData:
    counts = np.random.default_rng(0).poisson(2.0, size=(128, 30)).astype("float32")
    counts[:64, :10] *= 4
    cells = AnnData(counts)
    SCVI.setup_anndata(cells)
    return cells


def predict(model: SCVI) -> np.ndarray:
    return model.get_latent_representation(cells())


def fit(folder: Path) -> Run:
    from lora_lightning import LoRAFinetuning, lora

    scvi.settings.seed = 0
    model = SCVI(cells(), n_hidden=16, n_latent=4)
    trainer = {"accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": folder, "logger": True}
    model.train(max_epochs=2, batch_size=32, **trainer)
    before = {f"module.{key}": value for key, value in copy_of(model.module.state_dict()).items()}
    base_predictions = predict(model)

    callback, last = LoRAFinetuning(rank=4), Last()
    model.train(max_epochs=4, batch_size=32, plan_kwargs={"lr": 1e-2}, callbacks=[callback, last], **trainer)
    predictions = predict(model)
    lora.merge(model.module)
    model.save(folder / "tuned")
    return Run(callback, before, last, base_predictions, predictions)


def load(folder: Path) -> dict[str, Any]:
    return {"load": predict(SCVI.load(folder / "tuned", adata=cells(), accelerator="cpu"))}


if __name__ == "__main__":
    main(fit, load, "scvi-tools")
