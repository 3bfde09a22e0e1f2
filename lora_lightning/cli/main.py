"""Dispatches the commands, and turns errors into messages and exit codes."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from argparse import ArgumentError
from io import TextIOWrapper

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed
from typing_extensions import override

from lora_lightning.cli.closing import show_closing
from lora_lightning.cli.cpu import tune_for_cpu
from lora_lightning.cli.errors import explain
from lora_lightning.cli.lightning_cli import FUNCTIONS, LoRALightningCLI
from lora_lightning.cli.repair import repair_command
from lora_lightning.cli.report import report

DEBUG_VARIABLE = "LORA_LIGHTNING_DEBUG"
_NOISE = (
    # Data in memory needs no workers.
    ".*does not have many workers.*",
    # val_fraction=0 leaves no validation data, on purpose.
    "Total length of `list` across ranks is zero.*",
    # Arguments given by a Python caller are not a mistake.
    "LightningCLI's args parameter is intended to run from within Python.*",
    # A test or a resumed run has its own log folder, on purpose.
    "The dirpath has changed from.*",
    # Raised by Lightning 2.6.6 with PyTorch 2.15. Users cannot change it.
    ".*isinstance\\(treespec, LeafSpec\\).*",
)
_ADVERTISEMENT = "Tip: For seamless"
_AT_THE_END = ("`Trainer.fit` stopped", "The base is bitwise unchanged", "Adapters written: ")
"""Starts of messages at the end of `fit`. The closing lines repeat what matters."""
_IN_THE_CLOSING_LINES = "Report: "
"""Start of a message that the closing lines repeat in other words."""


def main(args: list[str] | None = None) -> int:
    """Run one command.

    Args:
        args: The arguments after `lora-lightning`. By default those of this process.

    Returns:
        The exit code: 0, or 1 if the command failed or was interrupted, or 2 for an error in the arguments.
    """
    words = sys.argv[1:] if args is None else args
    tune_for_cpu()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every encoding has the characters of progress bars and tables
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    # Both packages log with the logger of the one that was imported last.
    for package in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(f"{package}.utilities.rank_zero").addFilter(is_wanted)
    try:
        return _run(words, args)
    except (ArgumentError, ValueError, OSError, RuntimeError, MisconfigurationException) as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"lora-lightning: error: {explain(error, words)}", file=sys.stderr)
        print(f"(--help lists the options; {DEBUG_VARIABLE}=1 shows the traceback.)", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1
    except (KeyboardInterrupt, SystemExit) as stop:
        # On Ctrl-C, Lightning closes its loggers and exits with code 1.
        if isinstance(stop, SystemExit) and not isinstance(stop, SIGTERMException) and stop.code != 1:
            raise
        go_on = " --ckpt_path last resumes from there." if words[:1] == ["fit"] else ""
        print(f"lora-lightning: interrupted. All files written so far are kept.{go_on}", file=sys.stderr)
        return 1


def _run(words: list[str], args: list[str] | None) -> int:
    command = words[0] if words else ""
    if command == "repair":
        return repair_command(words[1:])
    if command == "report":
        return report(words[1:])
    if command in FUNCTIONS:
        LoRALightningCLI(words[1:], run=False, command=command).run_function()
        return 0
    cli = _OneCommandCLI(args, command)
    show_closing(cli.trainer, str(cli.subcommand), words)
    if distributed.is_available() and distributed.is_initialized():
        # Lightning leaves the threads of gloo running, and the process may abort when it exits. Other nodes of torchrun
        # would wait five minutes for it.
        distributed.destroy_process_group()
    return 0


class _OneCommandCLI(LoRALightningCLI):
    """Collects the options of the called command alone, since those of each take a tenth of a second.

    Args:
        args: The command-line arguments.
        command: The first of them. If it is no command, those of all are collected, for help and errors.
    """

    def __init__(self, args: list[str] | None, command: str) -> None:
        self._command = command
        super().__init__(args)

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override] # Lightning calls it by the instance
        commands = LoRALightningCLI.subcommands()
        return {self._command: commands[self._command]} if self._command in commands else commands


def is_wanted(record: logging.LogRecord) -> bool:
    """Return whether to print a message: no advertisement, and none that is repeated or ends up in a bar."""
    is_in_bar = sys.stdout.isatty() and str(record.msg).startswith(_AT_THE_END)
    is_repeated = str(record.msg).startswith(_IN_THE_CLOSING_LINES)
    return _ADVERTISEMENT not in str(record.msg) and not is_in_bar and not is_repeated
