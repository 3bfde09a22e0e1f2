"""Starts the command line. It only imports PyTorch if a command needs it."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

from lora_lightning import __version__

COMMANDS = {
    "init": "write example configurations for MNIST, images, texts or your own module",
    "fit": "train, or resume with --ckpt_path last",
    "validate": "evaluate on validation data",
    "test": "evaluate on test data, and compare base and adapted model",
    "predict": "predict, with --adapter for a folder of adapters, or none",
    "merge": "merge adapters into a plain checkpoint",
    "export": "write a trained model to an ONNX file",
    "find-lr": "try several learning rates in short runs",
    "report": "regenerate the report of a run, or compare runs",
    "repair": "find a weak class, repair it, and compare the result with baselines",
}
_USAGE = "usage: lora-lightning <command> [options]     lora-lightning <command> --help     lora-lightning --version"


def main(args: list[str] | None = None) -> int:
    """Run one command.

    Args:
        args: The arguments after `lora-lightning`. By default those of this process.

    Returns:
        The exit code: 1 if interrupted before the command starts, 2 for an unknown command, else that of
        `lora_lightning.cli.main.main`.
    """
    words = sys.argv[1:] if args is None else args
    if args is None and not sys.flags.safe_path:
        sys.path.append(str(Path.cwd()))  # for your own modules; `python -m lora_lightning` has it already
    first = words[0] if words else "--help"
    if first == "--version":
        print(f"lora-lightning {__version__}")
        return 0
    if first in ("-h", "--help"):
        print(f"{_USAGE}\n\nFine-tune any Lightning model with LoRA, and see what changed, class by class.\n")
        for command, what in COMMANDS.items():
            print(f"  {command:<10}{what}")
        return 0
    if not first.startswith("-") and first not in COMMANDS:
        close = difflib.get_close_matches(first, COMMANDS, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Expected one of {', '.join(COMMANDS)}."
        print(f"lora-lightning: error: there is no command {first!r}. {hint}", file=sys.stderr)
        return 2
    if first == "init":
        from lora_lightning.cli.init import init  # only this command needs it

        return init(words[1:])
    print(f"lora-lightning {__version__}: {first}", file=sys.stderr, flush=True)  # the imports take seconds
    try:
        from lora_lightning.cli.main import main as run  # it imports PyTorch, which takes seconds
    except KeyboardInterrupt:
        print("lora-lightning: interrupted before it started.", file=sys.stderr)
        return 1
    return run(args)
