"""matgl: a MEGNet that predicts one number of a crystal, in a plain Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matgl
import numpy as np
from lightning.pytorch import Trainer
from matgl.ext.pymatgen import Structure2Graph
from matgl.graph.data import MGLDataLoader, MGLDataset, collate_fn_graph
from matgl.models import MEGNet
from matgl.utils.training import ModelLightningModule
from pymatgen.core import Lattice, Structure
from steps import Last, Run, copy_of, main

ELEMENTS, CUTOFF = ("Na", "Cl", "K"), 6.0


def crystals() -> list[Structure]:
    cells = [(cation, 5.2 + 0.1 * number) for cation in ("Na", "K") for number in range(8)]
    return [Structure(Lattice.cubic(size), [cation, "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]) for cation, size in cells]


def loaders(folder: Path, sign: float) -> Any:
    data = MGLDataset(
        structures=crystals(), labels={"size": [sign * crystal.lattice.a for crystal in crystals()]},
        converter=Structure2Graph(element_types=ELEMENTS, cutoff=CUTOFF), root=str(folder), save_cache=False,
    )  # fmt: skip
    return MGLDataLoader(train_data=data, val_data=data, collate_fn=collate_fn_graph, batch_size=4, num_workers=0)


def predict(model: MEGNet) -> np.ndarray:
    model.eval()
    return np.array([model.predict_structure(crystal).item() for crystal in crystals()])


def trainer(folder: Path, *callbacks: Any) -> Trainer:
    return Trainer(
        max_epochs=2, accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), enable_progress_bar=False,
        inference_mode=False,
    )  # fmt: skip


def fit(folder: Path) -> Run:
    from lora_lightning import LoRAFinetuning, lora

    network = MEGNet(
        dim_node_embedding=8, hidden_layer_sizes_input=(16, 8), hidden_layer_sizes_conv=(16, 8), nblocks=1,
        hidden_layer_sizes_output=(8, 8), element_types=ELEMENTS, cutoff=CUTOFF,
    )  # fmt: skip
    model = ModelLightningModule(model=network, lr=1e-2)
    trainer(folder).fit(model, *loaders(folder, 1.0))
    before, base_predictions = copy_of(model.state_dict()), predict(network)

    callback, last = LoRAFinetuning(rank=4), Last()
    run, data = trainer(folder, callback, last), loaders(folder, -1.0)
    run.fit(model, *data)
    run.test(model, data[1])
    predictions = predict(network)
    lora.merge(network)
    network.save(folder / "tuned")
    return Run(callback, before, last, base_predictions, predictions)


def load(folder: Path) -> dict[str, Any]:
    return {"load_model": predict(matgl.load_model(folder / "tuned"))}


if __name__ == "__main__":
    main(fit, load, "matgl")
