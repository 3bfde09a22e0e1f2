"""The answer of find-lr beside a full grid of seven learning rates, and beside Lightning's finder.

`python -m tests.benchmarks.find_lr mnist --out mnist.json` adapts RichBoyNet, pretrained by one epoch on the embedded
digits, to the same digits. `python -m tests.benchmarks.find_lr banking77` adapts MiniLM to 10 questions of each intent
of Banking77; the data lie in the folder LORA_LIGHTNING_DATA, and MiniLM in the folder LORA_LIGHTNING_MINILM or the
Hugging Face hub. The configured rate is that for full fine-tuning. With `--out`, each run is written as soon as it has
ended, and a command that was stopped goes on with the others.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.tuner.tuning import Tuner
from rich.console import Console
from rich.table import Table

from lora_lightning import Classifier, LoRAFinetuning, MNISTDataModule, RichBoyNet, TextDataModule, text_backbone
from lora_lightning.find_lr import find_learning_rate
from lora_lightning.models import OneCycle

GRID = (0.1, 0.3, 1, 3, 10, 30, 100)
STEPS = (25, 100)
SEEDS = (0, 1, 2)
RATES = {"mnist": 1e-3, "banking77": 2e-4}
_EPOCHS = {"mnist": 20, "banking77": 10}
_EACH = 10
_DATA = Path(os.environ.get("LORA_LIGHTNING_DATA", "data")).resolve()
_MINILM = os.environ.get("LORA_LIGHTNING_MINILM", "sentence-transformers/all-MiniLM-L6-v2")
Parts = tuple[Trainer, Classifier, LightningDataModule]


def _trainer(*callbacks: Any, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


class Case:
    """A model, its data and its training, by seed.

    Args:
        name: `mnist` or `banking77`.
        folder: A folder for files of its own.
        layers: Number of layers of MiniLM, at most 6.
    """

    def __init__(self, name: str, folder: Path, layers: int) -> None:
        self.name, self.folder, self.layers = name, folder, layers
        self.base: dict[str, torch.Tensor] = {}

    def begin(self, seed: int) -> None:
        """Train the base of a seed, if it is trained here, and choose the samples."""
        seed_everything(seed, verbose=False)
        if self.name == "mnist":
            model = Classifier(RichBoyNet(), optimizer=partial(torch.optim.Adam, lr=0.003), lr_scheduler=OneCycle)
            _trainer(max_epochs=1).fit(model, datamodule=MNISTDataModule(source="sample", batch_size=128))
            self.base = model.backbone.state_dict()
            return
        rows = list(csv.DictReader((_DATA / "banking77/train.csv").open(encoding="utf-8")))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        counts: Counter[str] = Counter()
        for name in ("train", "val"):  # each has ten questions of each intent
            with (self.folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["text", "category"])
                writer.writeheader()
                most = _EACH if name == "train" else 2 * _EACH
                for row in (rows[index] for index in order[:: 1 if name == "train" else -1]):
                    if counts[row["category"]] < most:
                        counts[row["category"]] += 1
                        writer.writerow(row)

    def parts(self, seed: int, rate: float) -> Parts:
        """Return the trainer, the model and the data of `fit`."""
        seed_everything(seed, verbose=False)
        if self.name == "mnist":
            net = RichBoyNet()
            net.load_state_dict(self.base)
            model = Classifier(net, optimizer=partial(torch.optim.Adam, lr=rate), lr_scheduler=OneCycle)
            data: LightningDataModule = MNISTDataModule(source="sample", batch_size=128)
            return _trainer(LoRAFinetuning(rank=8), max_epochs=_EPOCHS[self.name]), model, data
        backbone = text_backbone(_MINILM, num_classes=77, pooling="mean")
        del backbone.encoder.encoder.layer[self.layers :]  # type: ignore[union-attr, index, operator]
        model = Classifier(backbone, optimizer=partial(torch.optim.AdamW, lr=rate), lr_scheduler=OneCycle)
        train, val = self.folder / "train.csv", self.folder / "val.csv"
        test = _DATA / "banking77/test.csv"
        data = TextDataModule(train, test=test, val=val, label_column="category", batch_size=32)
        adapters = LoRAFinetuning(rank=8, alpha=16, dropout=0.1, exclude_modules=["pooler.dense"])
        return _trainer(adapters, max_epochs=_EPOCHS[self.name], limit_val_batches=1.0), model, data

    def fit(self, seed: int, rate: float) -> dict[str, float]:
        """Train in full at one rate, and return the accuracies and the seconds of the training."""
        trainer, model, data = self.parts(seed, rate)
        began = time.perf_counter()
        trainer.fit(model, datamodule=data)
        seconds = time.perf_counter() - began
        val = trainer.validate(model, datamodule=data, verbose=False)[0]
        test = trainer.test(model, datamodule=data, verbose=False)[0]
        return {
            "val": 100 * val["val/accuracy"],
            "loss": val["val/loss"],
            "test": 100 * test["test/accuracy"],
            "seconds": seconds,
        }

    def find(self, seed: int, steps: int | None) -> dict[str, Any]:
        """Return what find-lr answers in how many seconds. `None` is its default."""
        parts = self.parts(seed, RATES[self.name])
        began = time.perf_counter()
        found = find_learning_rate(*parts, steps=steps)
        seconds = time.perf_counter() - began
        losses = {f"{trial.factor:g}": trial.loss for trial in found.trials}
        return {"factor": found.factor, "seconds": seconds, "steps": found.steps, "losses": losses}

    def lightning(self, seed: int) -> dict[str, Any]:
        """Return what Lightning's finder suggests, in how many seconds, and the result of a training with it."""
        trainer, model, data = self.parts(seed, RATES[self.name])
        began = time.perf_counter()
        found = Tuner(trainer).lr_find(model, datamodule=data, update_attr=False)
        seconds = time.perf_counter() - began
        rate = None if found is None else found.suggestion()
        fitted = {} if rate is None else self.fit(seed, rate)
        return {"rate": rate, "seconds": seconds, "test": fitted.get("test")}


def measure(case: Case, seeds: list[int], steps: list[int], out: Path | None) -> dict[str, Any]:
    """Run everything that is not in `out` yet."""
    results: dict[str, Any] = json.loads(out.read_text()) if out and out.exists() else {}
    for seed in seeds:
        case.begin(seed)
        runs = {f"{seed} find {most}": partial(case.find, seed, most) for most in (None, *steps)}
        runs |= {f"{seed} fit {factor:g}": partial(case.fit, seed, RATES[case.name] * factor) for factor in GRID}
        runs[f"{seed} lightning"] = partial(case.lightning, seed)
        for key, run in runs.items():
            if key in results:
                continue
            results[key] = run()
            print(key, results[key], flush=True)
            if out:
                out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def table(case: Case, seeds: list[int], steps: list[int], results: dict[str, Any]) -> Table:
    """Return the medians: what each way of choosing a rate reaches on test data, and what it costs."""
    shown = Table(title=f"{case.name}, seeds {', '.join(map(str, seeds))}")
    for column in ("way", "rates", "test accuracy, %", "median", "of the best", "seconds", "of the grid's"):
        shown.add_column(column)
    grids = [{factor: results[f"{seed} fit {factor:g}"] for factor in GRID} for seed in seeds]
    best = [max(fit["test"] for fit in grid.values()) for grid in grids]
    costs = [sum(fit["seconds"] for fit in grid.values()) for grid in grids]
    chosen = [min(grid, key=lambda factor, grid=grid: grid[factor]["loss"]) for grid in grids]  # type: ignore[misc]
    rows: dict[str, list[tuple[float, float, float]]] = {
        "the configured rate": [(1, grid[1]["test"], 0) for grid in grids],
        "grid of 7, by validation loss": [
            (f, grid[f]["test"], cost) for f, grid, cost in zip(chosen, grids, costs, strict=True)
        ],
    }
    for most in (None, *steps):
        found = [results[f"{seed} find {most}"] for seed in seeds]
        name = f"find-lr, {found[0]['steps']} steps" + ("" if most else " (default)")
        rows[name] = [
            (each["factor"], grid[each["factor"]]["test"], each["seconds"])
            for each, grid in zip(found, grids, strict=True)
        ]
    theirs = [results[f"{seed} lightning"] for seed in seeds]
    rows["Lightning's finder"] = [
        ((each["rate"] or 0) / RATES[case.name], each["test"] or 0, each["seconds"]) for each in theirs
    ]
    for name, each_seed in rows.items():
        tests, seconds = [test for _, test, _ in each_seed], [cost for *_, cost in each_seed]
        shown.add_row(
            name,
            ", ".join(f"{factor * RATES[case.name]:.2g}" for factor, *_ in each_seed),
            ", ".join(f"{test:.1f}" for test in tests),
            f"{statistics.median(tests):.1f}",
            f"{100 * min(test / most for test, most in zip(tests, best, strict=True)):.1f} % or more",
            f"{statistics.median(seconds):.0f}",
            f"{100 * statistics.median(a / b for a, b in zip(seconds, costs, strict=True)):.0f} %",
        )
    for factor in GRID:
        tests = [grid[factor]["test"] for grid in grids]
        cells = (", ".join(f"{test:.1f}" for test in tests), f"{statistics.median(tests):.1f}")
        shown.add_row("all steps", f"{factor * RATES[case.name]:.2g}", *cells)
    return shown


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=list(RATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--steps", type=int, nargs="*", default=list(STEPS))
    parser.add_argument("--layers", type=int, default=6, help="use the first layers of MiniLM only")
    parser.add_argument("--out", type=Path, help="a JSON file for the results, which may hold some already")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    with TemporaryDirectory() as folder:
        case = Case(options.case, Path(folder), options.layers)
        results = measure(case, options.seeds, options.steps, options.out)
    Console(width=160).print(table(case, options.seeds, options.steps, results))


if __name__ == "__main__":
    main()
