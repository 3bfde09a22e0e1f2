"""Starts processes of Python for tests without their imports: each is a fork of one that has imported the package."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import random
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
_IMPORTED = [
    "lora_lightning.cli.main",
    "lora_lightning.cli.lightning_cli",
    "lightning.pytorch.cli",
    "matplotlib.pyplot",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "torchvision",
]


class Process:
    """Runs a command of Python in a process of its own, or in one for each device.

    Several processes find each other by their environment, as those do that torchrun has started.

    Args:
        words: What follows `python` on the command line: `-m`, a module and its arguments, or a script and its.
        folder: The working directory.
        devices: Number of processes.
    """

    def __init__(self, *words: str, folder: Path, devices: int = 1) -> None:
        handle, name = tempfile.mkstemp(suffix=".txt")
        os.close(handle)
        self._output = Path(name)
        environment = {key: value for key, value in os.environ.items() if key != "PL_GLOBAL_SEED"}
        environment |= {"OMP_NUM_THREADS": "1"}
        if devices > 1:
            (port,) = free_ports(1)
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(devices)}
        self._processes = []
        for rank in range(devices):
            ranks = {} if devices == 1 else {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = (words, str(folder), environment | ranks, name)
            self._processes.append(_server().Process(target=_play, args=arguments))
            self._processes[-1].start()

    @property
    def has_ended(self) -> bool:
        """Return whether all processes have ended."""
        return all(process.exitcode is not None for process in self._processes)

    @property
    def code(self) -> int:
        """Return the exit code: that of the first process whose is not zero, which is negative after a signal."""
        codes = [process.exitcode for process in self._processes]
        assert None not in codes, "it has not ended"
        return next((code for code in codes if code), 0)

    @property
    def output(self) -> str:
        """Return what was printed so far, by all processes."""
        return self._output.read_text(errors="replace")

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all processes that have not ended."""
        for process in self._processes:
            if process.exitcode is None and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def finish(self, timeout: float = 900) -> str:
        """Wait until all processes have ended, and return what they printed. One that hangs is killed."""
        end = time.monotonic() + timeout
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        hangs = not self.has_ended
        if hangs:
            self.send(signal.SIGKILL)
            for process in self._processes:
                process.join()
        output = self.output
        self._output.unlink()
        assert not hangs, f"it had not ended after {timeout:g} seconds:\n{output}"
        return output


def run(*words: str, folder: Path, devices: int = 1) -> str:
    """Run a command of Python, which has to succeed, and return what it printed."""
    process = Process(*words, folder=folder, devices=devices)
    output = process.finish()
    assert process.code == 0, output
    return output


def free_ports(number: int) -> list[int]:
    """Return ports that no process takes in the meantime: connections get theirs from 32,768 on."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 200):
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            found.append(port)
    return found[:number]


def _server() -> multiprocessing.context.ForkServerContext:
    """Return the context of the process that is forked, which is started if it does not run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [before])])
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def _play(words: Sequence[str], folder: str, environment: Mapping[str, str], output: str) -> None:
    """Become the process of a command."""
    from lightning.pytorch.utilities import rank_zero_only

    with Path(output).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # as in a process that is no child of another
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", "0"))  # which Lightning reads when it is imported
    try:
        if words[0] == "-m":
            sys.argv = list(words[1:])
            sys.path.insert(0, folder)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a process of multiprocessing leaves out
