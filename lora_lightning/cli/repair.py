"""Implements `lora-lightning repair`."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from docstring_parser import parse
from jsonargparse import ArgumentParser

from lora_lightning.callbacks import LoRAFinetuning
from lora_lightning.checkpoints import newest_checkpoint
from lora_lightning.cli.closing import show_lines
from lora_lightning.cli.configured_repair import Configured
from lora_lightning.cli.errors import unknown_options_explained
from lora_lightning.data.focus import check_share
from lora_lightning.data.mnist_files import Source
from lora_lightning.repair.choice import named_classes
from lora_lightning.repair.comparison import compare
from lora_lightning.repair.digits import EXAMPLE, Digits
from lora_lightning.repair.process import Repair, Settings, say
from lora_lightning.repair.task import Task
from lora_lightning.repair.training import Runs
from lora_lightning.repair.verdict import KEPT, REPAIRED, TRADED, WITHIN_CHANCE, Verdict
from lora_lightning.wording import as_typed

_BROKEN = 1
_FOUND = ("worst", "worst-pair")
_OF_CONFIG = {"config", "data", "model", "trainer", "lora"}
_CODES = (
    "Exit codes: 0 repaired or improved, 3 errors were traded for others, 4 no repair, base kept, 5 fewer errors, but "
    "within chance (p above 0.05), 1 and 2 an error."
)
_CONFIG_HELP = (
    "YAML of a lora_lightning.Classifier and its data module, as fit takes it; with --data.x, --model.x, --trainer.x "
    "and --lora.x, which change it. Without it, an MLP on MNIST."
)


def repair_command(words: list[str]) -> int:
    """Run `repair` with its arguments and return the exit code."""
    of_config, own = divide(words)
    parser = repair_parser()
    with unknown_options_explained(parser):
        given = parser.parse_args(own).as_dict()
    given.pop("config")  # which is only for the help
    return repair(**given, of_config=of_config)


def repair_parser() -> ArgumentParser:
    """Return the parser for the options of `repair` itself."""
    description = f"{parse(repair.__doc__ or '').short_description} {_CODES}"
    parser = ArgumentParser(prog="lora-lightning repair", description=description, exit_on_error=False)
    parser.add_argument("--config", help=_CONFIG_HELP)
    parser.add_function_arguments(repair, as_positional=False, skip={"of_config"})
    return parser


def divide(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the arguments for the configuration, and all others."""
    of_config: list[str] = []
    own: list[str] = []
    target = own
    for word in words:
        if word.startswith("--"):
            name = word.removeprefix("--").partition("=")[0].partition(".")[0]
            target = of_config if name in _OF_CONFIG else own
        target.append(word)
    return of_config, own


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
    of_config: Sequence[str] = (),
) -> int:
    """Find the class with the lowest recall, repair it with LoRA, and report whether this succeeded.

    Without a configuration, this pretrains an MLP on MNIST. The class, rank, share and scale of the adapters
    (W + λ ΔW with λ from 0 to 1) are selected on validation data: the fewest errors on the class with no more errors on
    the others, and where the false positives do not rise by more than the errors on the class fall. The test data are
    only used for the verdict: "repaired", "improved" if chance explains the difference on the class alone, "fewer
    errors, within chance", "traded" if other errors increased, or "no repair found".

    Args:
        base_checkpoint: A trained model of configs/pretrain.yaml or configs/notebook/pretrain.yaml, or of the
            configuration: a file, or a log folder, whose newest checkpoint is used. Its adapters are merged first.
            Without it, a model is trained as in configs/pretrain.yaml, or as configured.
        focus: The class to repair, or several as "4,9". "worst" selects the class with the lowest recall on validation
            data, and "worst-pair" the two classes that are confused most often.
        source: "full" for the full MNIST, "sample" for the embedded sample, or "auto" for the full one if it is on disk
            or can be downloaded.
        data_dir: Folder of the full MNIST.
        rank: Rank of the adapters, or several ranks to select from.
        share: Share of the focus in a batch, or several shares to select from. By default 15 %, or 20 % on the sample
            and with a configuration. All other classes fill the rest.
        steps: Training steps of the adapters. By default 1,500 steps of 100 digits, 500 on the sample, or those of
            the configured fit.
        baselines: Also train the full network, the last layer and adapters without focus, select logit biases, and show
            all of them in a table and a figure.
        seeds: Number of seeds, each with its own base unless there is a base_checkpoint.
        seed: The first seed, for the weights and the order of the data.
        log_dir: Folder of the logs, which are written to <log_dir>/repair/version_N.
        accelerator: "auto", "cpu", "gpu", ...
        of_config: Arguments for a configuration: `--config` and options of `fit`.

    Returns:
        The exit code: 0 if the errors on the class fell and others did not rise, with p <= 0.05, 5 if chance explains
        that, 3 if others rose, 4 if no repair was found, and 1 if the base changed or disabling the adapters does not
        restore it. For several seeds, the highest exit code.
    """
    ranks = rank if isinstance(rank, list) else [rank]
    shares = share if isinstance(share, list) else [] if share is None else [share]
    if not ranks or share == []:
        raise ValueError(f"rank={rank}, share={share}: expected at least one of each.")
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps}: expected at least 1.")
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: expected at least 1.")
    for asked_rank in ranks:  # invalid values are refused before the training
        LoRAFinetuning(rank=asked_rank)
    for asked_share in shares:
        check_share(asked_share)
    if of_config and not any(word.startswith("--config") for word in of_config):
        raise ValueError(f"{of_config[0]} changes a configuration, but there is none: add --config.")
    if of_config and (source != "auto" or str(data_dir) != "data"):
        raise ValueError(
            f"source={source!r}, data_dir={str(data_dir)!r}: the configuration defines the data; change it with "
            "--data.x."
        )
    if not of_config and focus not in _FOUND:
        named_classes(focus, Digits.names)
    base_path = None if base_checkpoint is None else newest_checkpoint(base_checkpoint)
    verdicts, codes = [], []
    with _quiet_lightning():
        for number in range(seed, seed + seeds):
            if seeds > 1:
                say(f"[bold]Seed {number}[/]")
            task: Task = (
                Configured([*of_config, "--trainer.accelerator", accelerator], number)
                if of_config
                else Digits(Path(data_dir), source)
            )
            if focus not in _FOUND:
                named_classes(focus, task.names)
            settings = Settings(base_path, focus, ranks, shares, steps, number)
            one = Repair(settings, task, Runs(Path(log_dir), accelerator, task.log_every_n_steps))
            try:
                outcome = one.run()
            except (KeyboardInterrupt, SystemExit):  # Lightning exits on Ctrl-C
                if base := sorted(one.runs.folder.glob("base/checkpoints/*.ckpt")):
                    say(f"To go on with the trained base: --base_checkpoint {shlex.quote(as_typed(base[-1]))}")
                raise
            if baselines:
                compare(one, outcome)
            show_lines(_closing(one))
            verdicts.append(outcome.verdict)
            codes.append(_BROKEN if outcome.broken else outcome.verdict.exit_code)
    if seeds > 1:
        _summarize(verdicts, task.noun)
    return max(codes)


def _closing(one: Repair) -> dict[str, str]:
    """Return the location of the results, and the command that repeats the test."""
    folder = one.runs.folder
    lines = {"folder": str(folder)}
    for name, path in (
        ("report", "adapted/report.html"),
        ("adapter", "adapter"),
        ("figure", "tradeoff.png"),
    ):
        if (folder / path).exists():
            lines[name] = str(folder / path)
    lines["curves"] = f"tensorboard --logdir {shlex.quote(str(folder))}"
    if "adapter" in lines:
        words = ["lora-lightning", "test", *one.task.options, "--adapter", lines["adapter"], "--ckpt_path"]
        lines["next"] = shlex.join([*words, as_typed(one.base)])
        if EXAMPLE in one.task.options and not Path(EXAMPLE).exists():
            lines["next"] = f"lora-lightning init mnist && {lines['next']}"  # which writes the example
    return lines


def _summarize(verdicts: list[Verdict], noun: str) -> None:
    """Print the median and range over several seeds."""
    pairs = [(verdict.base, verdict.repaired or verdict.base) for verdict in verdicts]
    cut = [1 - after.focus_errors / max(before.focus_errors, 1) for before, after in pairs]
    others = [1 - after.other_errors / max(before.other_errors, 1) for before, after in pairs]
    codes = [verdict.exit_code for verdict in verdicts]
    repaired = [verdict.outcome for verdict in verdicts].count("repaired")
    say(
        f"[bold]{len(verdicts)} seeds[/]: errors on the {noun} cut by {median(cut):.0%} in the median "
        f"({min(cut):.0%} to {max(cut):.0%}), other errors by {median(others):.0%} "
        f"({min(others):.0%} to {max(others):.0%}); {repaired} repaired, "
        f"{codes.count(REPAIRED) - repaired} improved, "
        f"{codes.count(WITHIN_CHANCE)} within chance, {codes.count(TRADED)} traded, "
        f"{codes.count(KEPT)} without a repair."
    )


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Suppress messages of Lightning about hardware and files, and of transformers about new heads."""
    names = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric", "transformers")
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
