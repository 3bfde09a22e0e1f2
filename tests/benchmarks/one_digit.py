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
from lora_lightning.repair.answers import Answers, Tally
from lora_lightning.repair.training import Runs

SEEDS = range(5, 10)
NINE = (9,)
SCALES = [step / 20 for step in range(21)]
BIASES = [step / 4 for step in range(33)]
RECIPE = "--lora.rank 8 --lora.alpha 8 --data.batch_size 50 --model.optimizer.lr 0.0003 --trainer.max_epochs 6"
COPIES = "--data.distorted_copies true"
WAYS = {
    "the notebook's protocol": "",
    "distillation, weight 0.5": f"--lora.distillation 0.5 --lora.temperature 8 {RECIPE}",
    "distillation, weight 0.7": f"--lora.distillation 0.7 --lora.temperature 8 {RECIPE}",
    "with distorted copies, weight 0.5": f"--lora.distillation 0.5 --lora.temperature 8 {COPIES} {RECIPE}",
    "with distorted copies, weight 0.3, T = 4": f"--lora.distillation 0.3 --lora.temperature 4 {COPIES} {RECIPE}",
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
            tallies.append((scale, runs.answers(cli.model, cli.datamodule, "test").tally(NINE)))
    return tallies


def _biased(answers: Answers) -> Curve:
    nine = torch.nn.functional.one_hot(torch.tensor(9), 10)
    return [(value, answers.biased(value * nine).tally(NINE)) for value in BIASES]


def _one_seed(seed: int) -> dict[str, Curve]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = Runs(folder, "cpu", 50)
        base = _fit("pretrain", seed, folder)
        path = base.trainer.checkpoint_callback.best_model_path
        curves = {"bias on the logit of 9": _biased(runs.answers(base.model, base.datamodule, "test"))}
        for way, words in WAYS.items():
            trained = _fit("digit9", seed, folder, "--lora.base_checkpoint", path, *words.split())
            curves[way] = _curve(trained, runs)
    return curves


def _as_few(curve: Curve, errors: int) -> tuple[float, Tally] | None:
    """Return the first point with at most this many errors on the digit."""
    return next(((value, tally) for value, tally in curve if tally.focus_errors <= errors), None)


def run() -> tuple[Table, Any]:
    """Compare on the digit's errors, on all others, and on others where the digit's errors are as few as the protocol's."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    seeds = {seed: _one_seed(seed) for seed in SEEDS}
    table = Table(title="Errors on 9 / on all others; in brackets λ or bias: as few errors on 9 as the protocol's")
    for heading in ("", *map(str, SEEDS), "median"):
        table.add_column(heading)
    protocol = {seed: curves["the notebook's protocol"][-1][1] for seed, curves in seeds.items()}
    base = {seed: curves["the notebook's protocol"][0][1] for seed, curves in seeds.items()}
    _row(table, "base", list(base.values()))
    for way in WAYS:
        _row(table, way, [curves[way][-1][1] for curves in seeds.values()])
    for way in (*list(WAYS)[1:], "bias on the logit of 9"):
        found = [_as_few(curves[way], protocol[seed].focus_errors) for seed, curves in seeds.items()]
        cells = ["not reached" if each is None else f"{_cell(each[1])} ({each[0]:g})" for each in found]
        reached = [each for each in found if each is not None]
        ratios = [
            each[1].other_errors / protocol[seed].other_errors
            for seed, each in zip(seeds, found, strict=True)
            if each is not None
        ]
        others = median(each[1].other_errors for each in reached)
        table.add_row(f"{way}, matched", *cells, f"others {others:g}; ratio {median(ratios):.2f}")
    _figure(seeds).savefig(Path("docs") / "one_digit.png", dpi=120)
    plain = {
        seed: {
            way: [[value, tally.focus_errors, tally.other_errors] for value, tally in curve]
            for way, curve in curves.items()
        }
        for seed, curves in seeds.items()
    }
    return table, plain


def _cell(tally: Tally) -> str:
    return f"{tally.focus_errors} / {tally.other_errors:,}"


def _row(table: Table, name: str, tallies: list[Tally]) -> None:
    middle = [median(getattr(each, kind) for each in tallies) for kind in ("focus_errors", "other_errors")]
    table.add_row(name, *map(_cell, tallies), f"{middle[0]:g} / {middle[1]:,g}")


def _figure(seeds: dict[int, dict[str, Curve]]) -> Figure:
    """Return the medians over the seeds along each curve."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for way in (*WAYS, "bias on the logit of 9"):
        points = list(zip(*(curves[way] for curves in seeds.values()), strict=True))
        digit, others = (
            [median(getattr(tally, kind) for _, tally in each) for each in points]
            for kind in ("focus_errors", "other_errors")
        )
        label = f"{way}, λ from 0 to 1" if way in WAYS else way
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
