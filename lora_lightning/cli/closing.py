"""Says at the end of a command what it measured, where its results are, and what the next command is."""

from __future__ import annotations

import shlex
from pathlib import Path

from lightning.pytorch import Trainer
from rich.markup import escape

from lora_lightning.callbacks import LoRAFinetuning
from lora_lightning.report.terminal import show

_FILES = ("confusion*.json", "confusion*.csv", "predictions*.csv", "events.out.tfevents.*")
_METRICS = {"fit": "val/", "validate": "val/", "test": "test/"}


def show_closing(trainer: Trainer, command: str, words: list[str]) -> None:
    """Print one block of lines: metrics, the run's folder, what is in it, and the next command.

    Args:
        trainer: What ran the command.
        command: `fit`, `validate`, `test` or `predict`.
        words: The words of the command line, of which the next command is made.
    """
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined] # Trainer sets it from elsewhere
        return
    lines = dict(_metrics(trainer, command))
    folder = trainer.log_dir
    if folder is not None and Path(folder).is_dir():
        lines["folder"] = folder
        found = [path.name for pattern in _FILES for path in sorted(Path(folder).glob(pattern))]
        lines["files"] = ", ".join(name for name in found if not name.startswith("events"))
        lines["curves"] = (
            f"tensorboard --logdir {shlex.quote(folder)}" if found and found[-1].startswith("events") else ""
        )
    if command == "fit":
        lines["checkpoint"] = str(getattr(trainer.checkpoint_callback, "best_model_path", ""))
        for callback in trainer.callbacks:  # type: ignore[attr-defined] # likewise
            if isinstance(callback, LoRAFinetuning) and callback.adapter_folder:
                lines["adapter"] = str(callback.adapter_folder)
        if lines["checkpoint"]:
            lines["next"] = shlex.join(_test_of(words, lines["checkpoint"]))
    for name, text in lines.items():
        if text:
            show(f"{name:<11}{escape(text)}", soft_wrap=True, highlight=False)


def _metrics(trainer: Trainer, command: str) -> dict[str, str]:
    """Return what the run logged for this stage, with four digits, as one line. What a class has of its own is in the report."""
    prefix = _METRICS.get(command, "-")
    found = {
        name.removeprefix(prefix): each for name, each in trainer.callback_metrics.items() if name.startswith(prefix)
    }
    short = [f"{name} {float(value):.4g}" for name, value in found.items() if "/" not in name]
    return {prefix.removesuffix("/"): ", ".join(short)}


def _test_of(words: list[str], checkpoint: str) -> list[str]:
    """Return the command that tests what `fit` with these words trained."""
    kept = ["lora-lightning", "test"]
    rest = iter(words[1:])
    for word in rest:
        if word == "--ckpt_path":
            next(rest, None)
        elif not word.startswith("--ckpt_path="):
            kept.append(word)
    return [*kept, "--ckpt_path", checkpoint]
