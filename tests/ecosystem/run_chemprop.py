"""Chemprop: a message passing network on molecules, in a plain Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
from chemprop import data, models, nn
from lightning.pytorch import Trainer
from steps import Last, Run, copy_of, main

SMILES = ["C" * length + end for length in range(1, 9) for end in ("", "O", "N", "F")]


def loader(shift: float = 0.0) -> Any:
    """Return molecules with a number of each, which `shift` makes another task."""
    points = [data.MoleculeDatapoint.from_smi(smiles, y=np.array([len(smiles) + shift])) for smiles in SMILES]
    return data.build_dataloader(data.MoleculeDataset(points), batch_size=8, shuffle=False)


def trainer(folder: Path, *callbacks: Any) -> Trainer:
    return Trainer(
        max_epochs=2, accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), enable_progress_bar=False
    )


def predict(model: models.MPNN) -> np.ndarray:
    quiet = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    return np.concatenate([batch.numpy() for batch in quiet.predict(model, loader())])


def fit(folder: Path) -> Run:
    from lora_lightning import LoRAFinetuning, lora

    model = models.MPNN(nn.BondMessagePassing(d_h=32), nn.MeanAggregation(), nn.RegressionFFN(input_dim=32))
    trainer(folder).fit(model, loader())
    before, base_predictions = copy_of(model.state_dict()), predict(model)

    callback, last = LoRAFinetuning(rank=4, checkpoints="full"), Last()
    run = trainer(folder, callback, last)
    run.fit(model, loader(shift=5.0))
    run.test(model, loader(shift=5.0))
    predictions = predict(model)

    run.save_checkpoint(folder / "full.ckpt")
    merged = copy.deepcopy(model)
    lora.merge(merged)
    models.save_model(folder / "model.pt", merged)
    return Run(callback, before, last, base_predictions, predictions)


def load(folder: Path) -> dict[str, Any]:
    return {
        "load_model": predict(models.load_model(folder / "model.pt")),
        "load_from_checkpoint": predict(models.MPNN.load_from_checkpoint(folder / "full.ckpt")),
    }


if __name__ == "__main__":
    main(fit, load, "chemprop")
