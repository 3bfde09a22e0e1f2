"""Real cases, by the shipped configurations: adapters beside full fine-tuning, the last layer, the biases, and PEFT.

`text10` is `text` with 10 questions of each intent, which the seed chooses, for 4 epochs of 25 steps. What the base
could do before is measured there as the nearest name of an intent to each question, without the new head.

Each run is a process of its own that trains by the configuration of its case and tests once. The learning rates of all
methods were chosen on validation samples held out of the training split, with seed 3 (`choose` prints them); the
reported seeds are 0 to 2. The three seeds of a method run side by side if `--jobs 3` says so. With `--out` each run is
written as soon as it has ended, and a command that was stopped goes on with the others. The data lie in the folder
LORA_LIGHTNING_DATA, MiniLM comes from the Hugging Face hub or the folder LORA_LIGHTNING_MINILM.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich import get_console
from rich.table import Table

_ROOT = Path(__file__).parents[2]
_CONFIGS = _ROOT / "configs"
_DATA = Path(os.environ.get("LORA_LIGHTNING_DATA", "data")).resolve()
_MINILM = os.environ.get("LORA_LIGHTNING_MINILM", "sentence-transformers/all-MiniLM-L6-v2")
SEEDS = (0, 1, 2)
_CHOOSING_SEED = 3
_CONFIG = {"text": "text", "text10": "text", "ants_bees": "ants_bees"}
_HEADS = {"text": "classifier", "text10": "classifier", "ants_bees": "_fc"}
_EACH = 10
_OPTIONS = {
    "text": [
        f"--data.train={_DATA}/banking77/train.csv",
        f"--data.test={_DATA}/banking77/test.csv",
        f"--model.backbone.name={_MINILM}",
        "--model.backbone.num_classes=77",
    ],
    "ants_bees": [f"--data.root={_DATA}/hymenoptera", "--data.num_workers=0", "--data.in_memory=true"],
}
_OPTIONS["text10"] = [*_OPTIONS["text"], "--trainer.max_epochs=4", "--trainer.check_val_every_n_epoch=5"]
_KEPT = "full fine-tuning, norm statistics kept"
# PEFT makes its convolutions of the adapted layer's class, whose arguments in this network it does not know: an
# AssertionError.
_GRID = {
    "text": {
        "LoRA": (1e-3, 2e-3, 4e-3),
        "full fine-tuning": (1e-4, 2e-4, 4e-4),
        "last layer": (1e-2, 3e-2),
    },
    "text10": {
        "LoRA": (1e-3, 2e-3, 4e-3, 8e-3),
        "LoRA, init eva": (1e-3, 2e-3, 4e-3),
        "full fine-tuning": (5e-4, 1e-3, 2e-3),
        "biases and last layer": (5e-3, 1e-2, 2e-2),
        "last layer": (1e-2, 3e-2, 1e-1),
    },
    "ants_bees": {
        "LoRA": (1e-4, 5e-4, 1e-3, 2e-3, 5e-3),
        "full fine-tuning": (3e-5, 1e-4, 3e-4),
        _KEPT: (3e-5, 1e-4, 3e-4),
        "last layer": (3e-4, 1e-3, 3e-3),
    },
}
RATES = {
    "text": {"LoRA": 2e-3, "PEFT": 2e-3, "full fine-tuning": 2e-4, "last layer": 1e-2},
    "text10": {
        "the base": 0.0,
        "LoRA": 4e-3,
        "PEFT": 4e-3,
        "LoRA, init eva": 4e-3,
        "full fine-tuning": 5e-4,
        "biases and last layer": 1e-2,
        "last layer": 3e-2,
    },
    "ants_bees": {"LoRA": 1e-4, "full fine-tuning": 3e-5, _KEPT: 3e-5, "last layer": 3e-4},
}


def train(
    case: str, method: str, seed: int, rate: float, device: str, choosing: bool, more: list[str]
) -> dict[str, Any]:
    """Train and test in this process, and return what the table shows."""
    import safetensors.torch
    import torch
    from lightning.pytorch.cli import LightningCLI

    from lora_lightning import LoRAFinetuning
    from lora_lightning.lora.freeze import freeze
    from tests.benchmarks.vgg19 import peak_resident

    options = [f"--config={_CONFIGS / _CONFIG[case]}.yaml", *_OPTIONS[case], f"--seed_everything={seed}"]
    options += [f"--model.optimizer.lr={rate}", f"--trainer.accelerator={device}", "--trainer.devices=1", *more]
    options += ["--trainer.logger=false", "--trainer.enable_model_summary=false"]
    if choosing and case == "ants_bees":  # a quarter of the training photographs validates
        options += [f"--data.root={_DATA}/hymenoptera/train", "--data.val_fraction=0.25", f"--data.split_seed={seed}"]
    folder = TemporaryDirectory()
    if case == "text10":
        options += [f"--data.{name}={_few(Path(folder.name), name, seed)}" for name in ("train", "val")]
    cli = LightningCLI(args=options, run=False, seed_everything_default=0, auto_configure_optimizers=False)
    ours = next(each for each in cli.trainer.callbacks if isinstance(each, LoRAFinetuning))
    cli.trainer.callbacks = []  # no progress bar, no checkpoints, no report
    head = _HEADS[case]
    recorded = _Recorded(cli.model.backbone, head)
    if method == "LoRA":
        cli.trainer.callbacks = [ours]
    elif method == "LoRA, init eva":
        cli.trainer.callbacks = [LoRAFinetuning(ours.config, init="eva")]
    elif method == "PEFT":
        cli.model.backbone = _with_peft(cli.model.backbone, ours.config, head)
    elif method in (_KEPT, "last layer", "biases and last layer"):
        freeze(cli.model.backbone)  # norm layers keep their statistics, as beside adapters
        biases = method.startswith("biases")
        for name, parameter in cli.model.backbone.named_parameters():
            is_trained = method == _KEPT or name.startswith(head) or (biases and name.endswith(".bias"))
            parameter.requires_grad_(is_trained)
    began = time.perf_counter()
    if method != "the base":
        cli.trainer.fit(cli.model, cli.datamodule)
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else peak_resident()
    trained = {name: each.detach().cpu() for name, each in cli.model.named_parameters() if each.requires_grad}
    test = cli.trainer.validate if choosing else cli.trainer.test
    with recorded.of(cli.model.backbone):
        found = test(cli.model, cli.datamodule, verbose=False)[0]
    own = recorded.nearest_names(cli.model, cli.datamodule) if _CONFIG[case] == "text" and not choosing else math.nan
    folder.cleanup()
    return {
        "own": own,
        "accuracy": 100 * found["val/accuracy" if choosing else "test/accuracy"],
        "seconds": seconds,
        "peak": peak,
        "trained": sum(each.numel() for each in trained.values()),
        "file": len(safetensors.torch.save(trained)) / 1e6,
    }


def _few(folder: Path, name: str, seed: int) -> Path:
    """Write ten questions of each intent, different ones to train and to validate, and return the file."""
    import torch

    rows = list(csv.DictReader((_DATA / "banking77/train.csv").open(encoding="utf-8")))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [rows[index] for index in (order if name == "train" else reversed(order))]
    counts: Counter[str] = Counter()
    path = folder / f"{name}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "category"])
        writer.writeheader()
        for row in shuffled:  # an intent has 35 questions or more
            counts[row["category"]] += 1
            if counts[row["category"]] <= _EACH:
                writer.writerow(row)
    return path


class _Recorded:
    """Records the vectors of texts that the head of a network gets."""

    def __init__(self, backbone: Any, head: str) -> None:
        self.facts, self.head = getattr(backbone, "backbone_facts", None), head
        self.vectors: list[Any] = []

    @contextmanager
    def of(self, backbone: Any) -> Iterator[None]:
        """Record those of the network, which PEFT may have wrapped."""
        head = next(child for name, child in backbone.named_modules() if name.endswith(self.head))
        hook = head.register_forward_pre_hook(lambda _, inputs: self.vectors.append(inputs[0].detach().cpu()))
        try:
            yield
        finally:
            hook.remove()

    def nearest_names(self, model: Any, data: Any) -> float:
        """Return for how many test questions, in percent, the nearest name of an intent is the right one."""
        import torch
        from torch.nn import functional as F

        targets = torch.cat([targets for _, targets in data.test_dataloader()])
        questions = F.normalize(torch.cat(self.vectors))
        self.vectors = []
        names = [name.replace("_", " ") for name in data.class_names]
        with self.of(model.backbone), torch.no_grad():
            model.eval()(dict(self.facts.tokenizer(names, padding=True, return_tensors="pt")))
        right = (questions @ F.normalize(torch.cat(self.vectors)).T).argmax(1) == targets
        return 100 * float(right.float().mean())


def _with_peft(backbone: Any, config: Any, head: str) -> Any:
    """Return the backbone with PEFT's adapters in the layers that are adapted here, and the head trained in full."""
    import copy
    import dataclasses

    import peft

    from lora_lightning.lora import adapted_weights, attach

    probe = copy.deepcopy(backbone)
    attach(probe, dataclasses.replace(config, modules_to_save=[head]))
    layers = {each.layer_name: each.layer for each in adapted_weights(probe)}
    # PEFT takes no convolution whose groups do not divide the rank, as those of depthwise ones do not.
    names = [name for name, layer in layers.items() if config.rank % getattr(layer, "groups", 1) == 0]
    alpha = config.rank if config.alpha is None else config.alpha
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=alpha, lora_dropout=config.dropout, target_modules=names, modules_to_save=[head]
    )
    return peft.get_peft_model(backbone, settings)


def _processes(runs: list[tuple[Any, ...]], jobs: int, out: Path | None = None) -> list[dict[str, Any]]:
    """Run `train` with each of these arguments in a process of its own, `jobs` at a time, except those in `out`."""
    finished: dict[str, dict[str, Any]] = json.loads(out.read_text()) if out and out.exists() else {}

    def process(arguments: tuple[Any, ...]) -> dict[str, Any]:
        key = ", ".join(map(str, (*arguments[:5], *arguments[6]))) + (", choosing" if arguments[5] else "")
        if key in finished:
            return finished[key]
        code = (
            "import json; from tests.benchmarks.real_cases import train; "
            f"print('\\n' + json.dumps(train(*{arguments!r})))"
        )
        # jsonargparse works in the configuration's folder, from which `examples` is not found by itself.
        found_in = os.environ | {"PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=found_in, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{arguments}: {done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        print(key, {name: round(value, 2) for name, value in found.items()}, flush=True)
        finished[key] = found
        if out:
            out.write_text(json.dumps(dict(finished), indent=1) + "\n")
        return found

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(process, runs))


def choose(case: str, device: str, jobs: int, out: Path | None, more: list[str]) -> dict[str, float]:
    """Return the learning rate of each method that validated best, with a seed that is not reported."""
    runs = [(case, m, _CHOOSING_SEED, rate, device, True, more) for m, rates in _GRID[case].items() for rate in rates]
    results = _processes(runs, jobs, out)
    accuracies = {(run[1], run[3]): found["accuracy"] for run, found in zip(runs, results, strict=True)}
    return {method: max(rates, key=lambda rate: accuracies[method, rate]) for method, rates in _GRID[case].items()}


def run(case: str, seeds: tuple[int, ...], device: str, jobs: int, out: Path | None, more: list[str]) -> Table:
    """Run all methods with the reported seeds and these further options, but for the runs that are in `out`."""
    columns = ("test accuracy, %", "median", "own task, %", "seconds", "peak MB", "trained", "file MB")
    table = Table("", *columns, title=f"{case}, seeds {', '.join(map(str, seeds))}, {device}")
    runs = [(case, method, seed, rate, device, False, more) for seed in seeds for method, rate in RATES[case].items()]
    found_by_run = list(zip(runs, _processes(runs, jobs, out), strict=True))
    results = {method: [found for run, found in found_by_run if run[1] == method] for method in RATES[case]}
    for method, found in results.items():
        median = {key: statistics.median(each[key] for each in found) for key in found[0]}
        accuracies = ", ".join(f"{each['accuracy']:.2f}" for each in found)
        cells = (
            f"{median['accuracy']:.2f}",
            f"{median['own']:.1f}",
            f"{median['seconds']:,.0f}",
            f"{median['peak']:,.0f}",
        )
        table.add_row(method, accuracies, *cells, f"{median['trained']:,.0f}", f"{median['file']:.2f}")
    return table


def main() -> None:
    """Run what the command line names: `python -m tests.benchmarks.real_cases text --device cuda --jobs 3`.

    Further options, such as `--trainer.max_epochs=1`, override the configuration.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=list(_HEADS))
    parser.add_argument("--choose", action="store_true", help="print validation accuracies of the learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file for the results, which may hold some already")
    options, more = parser.parse_known_args()
    if options.choose:
        print(choose(options.case, options.device, options.jobs, options.out, more))
        return
    get_console().print(run(options.case, tuple(options.seeds), options.device, options.jobs, options.out, more))


if __name__ == "__main__":
    main()
