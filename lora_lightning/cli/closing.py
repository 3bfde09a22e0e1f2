"""Prints the metrics, the location of the results and the next command at the end of a command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap

from lightning.pytorch import Trainer
from rich import get_console
from rich.markup import escape

from lora_lightning.callbacks.merging import finetuning_of
from lora_lightning.callbacks.summary import stage_metrics
from lora_lightning.lora import is_adapted, is_untrained
from lora_lightning.report.terminal import show
from lora_lightning.wording import as_typed

_FILES = ("*.csv", "confusion*.json", "*.png")
_INDENT = 11
_CHARTS = "http://localhost:6006/#custom_scalars"
"""Page of TensorBoard with training and validation in one chart for each metric."""
_WRAPPED = ("val", "test", "files", "base")
_OF_TEST = ("--weights_only",)
"""Options of `test` that `merge` does not have."""
_STAGES = {"fit": "val", "validate": "val", "test": "test"}


def show_closing(trainer: Trainer, command: str, words: list[str]) -> None:
    """Print the metrics, the folder of the run, its files, and the next command.

    Args:
        trainer: The trainer that ran the command.
        command: `fit`, `validate`, `test` or `predict`.
        words: The command-line arguments, from which the next command is made.
    """
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined] # Trainer sets it from elsewhere
        return
    folder = getattr(trainer.logger, "log_dir", None)  # trainer.log_dir would wait for all devices
    lines: dict[str, str] = {}
    if stage := _STAGES.get(command):
        lines[stage] = ", ".join(f"{name} {value:.4g}" for name, value in stage_metrics(trainer, stage).items())
    if folder is not None and Path(folder).is_dir():
        lines["folder"] = folder
        pages = sorted(Path(folder).glob("report*.html"), key=lambda path: path.stat().st_mtime_ns)
        lines["report"] = str(pages[-1]) if pages else ""
        lines["files"] = ", ".join(path.name for pattern in _FILES for path in sorted(Path(folder).glob(pattern)))
        if any(True for _ in Path(folder).glob("events.out.tfevents.*")):
            lines["curves"] = f"tensorboard --logdir {shlex.quote(folder)}"
            lines["opens at"] = _CHARTS if command == "fit" else ""
    if command == "fit":
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        lines["checkpoint"] = as_typed(best) if best else ""
        callback = finetuning_of(trainer)
        if callback is not None and callback.adapter_folder:
            lines["adapter"] = as_typed(callback.adapter_folder)
            lines["base"] = callback.base_in_words  # repeated, since a progress bar may overwrite it
        if lines["checkpoint"]:
            lines["next"] = shlex.join(_test_of(words, lines["checkpoint"]))
    if command == "test" and words[0] == "test" and _has_trained_adapters(trainer):
        lines["next"] = shlex.join(["lora-lightning", "merge", *_without_own_options(words[1:])])
    show_lines(lines)


def show_lines(lines: Mapping[str, str]) -> None:
    """Print the non-empty lines after their names.

    On a terminal, lists and sentences are wrapped behind their names. Paths and commands stay on one line, which can be
    copied.
    """
    console = get_console()
    for name, text in lines.items():
        shown = text
        if name in _WRAPPED and console.is_terminal:
            shown = f"\n{' ' * _INDENT}".join(wrap(text, max(console.width - _INDENT, 20), break_on_hyphens=False))
        if text:
            show(f"{name:<{_INDENT}}{escape(shown)}", soft_wrap=True, highlight=False)


def _has_trained_adapters(trainer: Trainer) -> bool:
    callback = finetuning_of(trainer)
    if callback is None or callback.adapted is None:
        return False
    return is_adapted(callback.adapted) and not is_untrained(callback.adapted)


def _without_own_options(words: list[str]) -> list[str]:
    """Return arguments of `test` without those that `merge` does not have."""
    kept, rest = [], iter(words)
    for word in rest:
        if word in _OF_TEST:
            next(rest, None)
        elif not word.startswith(tuple(f"{option}=" for option in _OF_TEST)):
            kept.append(word)
    return kept


def _test_of(words: list[str], checkpoint: str) -> list[str]:
    """Return the command that tests the result of `fit` with these arguments."""
    kept = ["lora-lightning"]
    first = words.index("fit") if "fit" in words else len(words)
    rest = iter([*words[:first], "test", *words[first + 1 :]])
    for word in rest:
        if word == "--ckpt_path":
            next(rest, None)
        elif not word.startswith("--ckpt_path="):
            kept.append(word)
    return [*kept, "--ckpt_path", checkpoint]
