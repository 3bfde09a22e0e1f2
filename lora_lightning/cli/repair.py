"""`lora-lightning repair`: the whole story on MNIST in one command."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from lora_lightning.callbacks import LoRAFinetuning
from lora_lightning.cli.closing import show_lines
from lora_lightning.data import MNISTDataModule
from lora_lightning.data.mnist_files import Source
from lora_lightning.repair.choice import named_classes
from lora_lightning.repair.comparison import compare
from lora_lightning.repair.process import Repair, Settings, say
from lora_lightning.repair.training import Runs
from lora_lightning.repair.verdict import Verdict
from lora_lightning.resume.checkpoints import newest_checkpoint

_BROKEN = 1


def repair(
    base_checkpoint: str | os.PathLike[str] | None = None,
    focus: int | str = "worst",
    source: Source = "auto",
    data_dir: str | os.PathLike[str] = "data",
    rank: int | list[int] = 8,
    share: float | list[float] | None = None,
    steps: int | None = None,
    baselines: bool = False,
    seeds: int = 1,
    seed: int = 0,
    log_dir: str | os.PathLike[str] = "logs",
    accelerator: str = "auto",
) -> int:
    """Pretrain an MLP on MNIST, find the digit it is poor at, repair that with LoRA, and say whether it is a repair.

    The digit, the rank, the share and the scale of the adapters (W + λ ΔW, λ from 0 to 1) are chosen on validation data: the fewest
    errors on the digit with no more errors on the others, and at most 1.5 times as many others taken for it. Test data
    serve the verdict alone: "repaired"; "traded", if other errors came for those that went; or "no repair found".

    Args:
        base_checkpoint: A trained model of configs/pretrain.yaml or configs/notebook/pretrain.yaml: a file, or a log
            folder, whose newest checkpoint is taken. Without it, a model is trained by the recipe of configs/pretrain.yaml.
        focus: The digit to repair, or several as "4,9"; "worst" for the one of lowest recall on validation, "worst-pair" for the
            two that are taken for each other most often.
        source: "full" MNIST, the embedded "sample", or "auto": full where it is on disk or can be downloaded.
        data_dir: Where the full MNIST is or goes.
        rank: Rank of the adapters, or several to choose from.
        share: Share of the focus in a batch, or several to choose from; by default 15 %, or 20 % on the sample. All others fill the
            rest.
        steps: Training steps of the adapters, of 100 digits each; by default 1,500, or 500 on the sample.
        baselines: Also train the full network and the last layer alone, adapters without focus, and on a random digit, and choose
            logit biases; show them in one table and one figure.
        seeds: How many seeds to go through, each from a base of its own unless there is a base_checkpoint.
        seed: The first seed, of the weights and of the order of the data.
        log_dir: Where logs go, as <log_dir>/repair/version_N.
        accelerator: "auto", "cpu", "gpu", ...

    Returns:
        The exit code: 0 if the errors on the digit fell and no others came; 3 if others came; 4 if no repair was found; 1 if the base
        changed, or does not come back when the adapters are off. Of several seeds, the highest.
    """
    ranks = rank if isinstance(rank, list) else [rank]
    shares = share if isinstance(share, list) else [] if share is None else [share]
    if not ranks or share == []:
        raise ValueError(f"rank={rank}, share={share}: expected at least one of each.")
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps}: expected at least 1.")
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: expected at least 1.")
    for each_rank in ranks:  # what can't be is refused before the long work
        LoRAFinetuning(rank=each_rank)
    for each_share in shares:
        MNISTDataModule(focus=[0], focus_fraction=each_share)
    if focus not in ("worst", "worst-pair"):
        named_classes(focus, MNISTDataModule.class_names)
    base_path = None if base_checkpoint is None else newest_checkpoint(base_checkpoint)
    verdicts, codes = [], []
    with _quiet_lightning():
        for number in range(seed, seed + seeds):
            if seeds > 1:
                say(f"[bold]Seed {number}[/]")
            settings = Settings(base_path, focus, source, Path(data_dir), ranks, shares, steps, number)
            one = Repair(settings, Runs(Path(log_dir), accelerator))
            outcome = one.run()
            if baselines:
                compare(one, outcome)
            show_lines(_closing(one))
            verdicts.append(outcome.verdict)
            codes.append(_BROKEN if outcome.broken else outcome.verdict.exit_code)
    if seeds > 1:
        _summarize(verdicts)
    return max(codes)


def _closing(one: Repair) -> dict[str, str]:
    """Return where the results of a repair are, and the command that tests it again."""
    folder = one.runs.folder
    lines = {"folder": str(folder)}
    for name, path in (("report", "adapted/report.html"), ("adapter", "adapter"), ("figure", "tradeoff.png")):
        if (folder / path).exists():
            lines[name] = str(folder / path)
    lines["curves"] = f"tensorboard --logdir {shlex.quote(str(folder))}"
    if "adapter" in lines:
        words = ["lora-lightning", "test", "--config", "configs/adapt.yaml", "--data.source", one.source]
        words += [
            "--data.data_dir",
            str(one.settings.data_dir),
            "--adapter",
            lines["adapter"],
            "--ckpt_path",
            str(one.base),
        ]
        lines["next"] = shlex.join(words)
    return lines


def _summarize(verdicts: list[Verdict]) -> None:
    """Say the median and range of several seeds."""
    pairs = [(each.base, each.repaired or each.base) for each in verdicts]
    cut = [1 - after.focus_errors / max(before.focus_errors, 1) for before, after in pairs]
    others = [1 - after.other_errors / max(before.other_errors, 1) for before, after in pairs]
    codes = [each.exit_code for each in verdicts]
    say(
        f"[bold]{len(verdicts)} seeds[/]: errors on the digit cut by {median(cut):.0%} in the median ({min(cut):.0%} to {max(cut):.0%}), other "
        f"errors by {median(others):.0%} ({min(others):.0%} to {max(others):.0%}); {codes.count(0)} repaired, {codes.count(3)} traded, "
        f"{codes.count(4)} without a repair."
    )


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence Lightning's information about machines and files."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
