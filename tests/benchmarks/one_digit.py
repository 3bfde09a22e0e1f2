"""Adapters that see the digit 9 alone: the notebook's protocol, distillation, scaled adapters and a bias, seeds 5 to 9."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table

from lora_lightning import LoRAFinetuning
from lora_lightning.cli.main import LoRALightningCLI
from lora_lightning.lora.scaling import scaled
from lora_lightning.repair.predictions import Predictions, Tally
from lora_lightning.repair.training import Runs

SEEDS = range(5, 10)
NINE = (9,)
SCALES = [step / 20 for step in range(26)]
BIASES = [step / 4 for step in range(33)]
RECIPE = "--lora.rank 8 --lora.alpha 8 --data.batch_size 50 --model.optimizer.lr 0.0003 --trainer.max_epochs 6"
COPIES = "--data.distorted_copies true"
_PROTOCOL, _BIAS = "the notebook's protocol", "bias on the logit of 9"
WAYS = {
    _PROTOCOL: "",
    "distillation, weight 0.5": f"--lora.distillation 0.5 --lora.temperature 8 {RECIPE}",
    "with distorted copies, weight 0.3": f"--lora.distillation 0.3 --lora.temperature 8 {COPIES} {RECIPE}",
    "with distorted copies, weight 0.15": f"--lora.distillation 0.15 --lora.temperature 8 {COPIES} {RECIPE}",
}
Curve = list[tuple[float, Tally]]


def _fit(config: str, seed: int, folder: Path, *words: str) -> LoRALightningCLI:
    """Train by one of the notebook's configurations on the full MNIST."""
    data = [
        "--data.data_dir",
        str(Path(os.environ.get("LORA_LIGHTNING_DATA", "data")).resolve()),
        "--data.source",
        "full",
    ]
    quiet = [
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.accelerator",
        "cpu",
        "--trainer.logger.save_dir",
        str(folder),
    ]
    own = ["--config", f"configs/notebook/{config}.yaml", "--seed_everything", str(seed)]
    cli = LoRALightningCLI([*own, *data, *quiet, *words], run=False)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return cli


def _curve(cli: LoRALightningCLI, runs: Runs) -> Curve:
    callbacks: list[Any] = cli.trainer.callbacks
    (finetuning,) = [each for each in callbacks if isinstance(each, LoRAFinetuning)]
    tallies = []
    for scale in SCALES:
        with scaled(finetuning.adapted, scale):
            tallies.append((scale, runs.predict(cli.model, cli.datamodule, "test").tally(NINE)))
    return tallies


def _biased(predictions: Predictions) -> Curve:
    nine = torch.nn.functional.one_hot(torch.tensor(9), 10)
    return [(value, predictions.biased(value * nine).tally(NINE)) for value in BIASES]


def _one_seed(seed: int) -> dict[str, Curve]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = Runs(folder, "cpu", 50)
        base = _fit("pretrain", seed, folder)
        path = base.trainer.checkpoint_callback.best_model_path
        curves = {_BIAS: _biased(runs.predict(base.model, base.datamodule, "test"))}
        for way, words in WAYS.items():
            trained = _fit("digit9", seed, folder, "--lora.base_checkpoint", path, *words.split())
            curves[way] = _curve(trained, runs)
    return curves


def _median(tallies: list[Tally]) -> tuple[float, float]:
    """Return the medians of the errors on the digit and on all others."""
    return median(each.focus_errors for each in tallies), median(each.other_errors for each in tallies)


def _along(way: str, seeds: dict[int, dict[str, Curve]]) -> list[tuple[float, list[Tally]]]:
    """Return the tallies of all seeds for each scale or bias."""
    points = zip(*(curves[way] for curves in seeds.values()), strict=True)
    return [(each[0][0], [tally for _, tally in each]) for each in points]


def run() -> tuple[Table, Any]:
    """Compare on the digit's errors, on all others, and on others where the digit's errors are as few as the protocol's."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    seeds = {seed: _one_seed(seed) for seed in SEEDS}
    table = table_of(seeds)
    _figure(seeds).savefig(Path("docs") / "one_digit.png", dpi=120)
    plain = {
        seed: {
            way: [[value, tally.focus_errors, tally.other_errors] for value, tally in curve]
            for way, curve in curves.items()
        }
        for seed, curves in seeds.items()
    }
    return table, plain


def table_of(seeds: dict[int, dict[str, Curve]]) -> Table:
    """Return the errors of all ways at scale 1, and at the first scale or bias with as few errors on 9 as the protocol's, by medians."""
    table = Table(
        title="Errors on 9 / on all others; in brackets a common λ or bias: as few errors on 9 as the protocol's in the median"
    )
    for heading in ("", *map(str, seeds), "median", "others, relative"):
        table.add_column(heading)
    rows = {"base": _along(_PROTOCOL, seeds)[0][1]} | {way: dict(_along(way, seeds))[1.0] for way in WAYS}
    digit, others = _median(rows[_PROTOCOL])
    for way in (*list(WAYS)[1:], _BIAS):
        for value, tallies in _along(way, seeds):
            if _median(tallies)[0] <= digit:
                rows[f"{way}, matched ({value:g})"] = tallies
                break
    for name, tallies in rows.items():
        middle = _median(tallies)
        cells = [f"{each.focus_errors} / {each.other_errors:,}" for each in tallies]
        table.add_row(name, *cells, f"{middle[0]:g} / {middle[1]:,g}", f"{middle[1] / others:.2f}")
    return table


def _figure(seeds: dict[int, dict[str, Curve]]) -> Figure:
    """Return the medians over the seeds along each curve."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for way in (*WAYS, _BIAS):
        digit, others = zip(*(_median(tallies) for _, tallies in _along(way, seeds)), strict=True)
        label = f"{way}, λ from 0 to {SCALES[-1]}" if way in WAYS else way
        axis.plot(others, digit, "o-", markersize=3, label=label)
    axis.set(
        xlabel="errors on all other digits",
        ylabel="errors on 9",
        title="Digit 9's data alone: test digits, medians of seeds 5 to 9",
    )
    axis.set_xlim(300, 1200)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    return figure
