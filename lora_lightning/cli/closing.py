"""Prints the metrics, the location of the results and the next command at the end of a command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import Trainer
from rich.markup import escape

from lora_lightning.callbacks.merging import finetuning_of
from lora_lightning.callbacks.summary import stage_metrics
from lora_lightning.report.terminal import show

_FILES = ("*.csv", "confusion*.json", "*.png")
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
    if command == "fit":
        lines["checkpoint"] = str(getattr(trainer.checkpoint_callback, "best_model_path", ""))
        callback = finetuning_of(trainer)
        if callback is not None and callback.adapter_folder:
            lines["adapter"] = str(callback.adapter_folder)
            lines["base"] = callback.base_in_words  # repeated, since a progress bar may overwrite it
        if lines["checkpoint"]:
            lines["next"] = shlex.join(_test_of(words, lines["checkpoint"]))
    show_lines(lines)


def show_lines(lines: Mapping[str, str]) -> None:
    """Print the non-empty lines after their names."""
    for name, text in lines.items():
        if text:
            show(f"{name:<11}{escape(text)}", soft_wrap=True, highlight=False)


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
