"""Reads and writes the file in a log folder that says what a run started from, and how it ended."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

STARTED_FROM = "started_from.txt"
"""File in a log folder: the checkpoint that the run started from, or an empty line, and then how it ended."""
_STEPS, _BEST = "finished after steps: ", "best checkpoint: "
_DEPTH = 4
"""Number of folders between a checkpoint and the log folder of its run, at most."""


@dataclass(frozen=True)
class RunRecord:
    """Holds what is known of a run of the command line.

    Args:
        folder: The log folder.
        started_from: The checkpoint that the run started from, or an empty string.
        steps: Number of steps after which it finished, or `None` if it did not, or still runs.
        best: The best checkpoint, or the last one if no metric is monitored. `None` if it did not finish, or saved
            none.
    """

    folder: Path
    started_from: str
    steps: int | None
    best: Path | None

    @classmethod
    def read(cls, folder: Path) -> RunRecord | None:
        """Return the record in a log folder, or `None` if there is none."""
        path = folder / STARTED_FROM
        if not path.is_file():
            return None
        first, *others = path.read_text(encoding="utf-8").splitlines() or [""]
        steps = next((line.removeprefix(_STEPS) for line in others if line.startswith(_STEPS)), "")
        best = next((line.removeprefix(_BEST) for line in others if line.startswith(_BEST)), "")
        return cls(folder, first.strip(), int(steps) if steps.isdecimal() else None, folder / best if best else None)

    @classmethod
    def of(cls, file: Path) -> RunRecord | None:
        """Return the record of the run that wrote a file, or `None` if there is none."""
        return next(filter(None, map(cls.read, list(file.parents)[:_DEPTH])), None)

    @staticmethod
    def start(folder: Path, started_from: str) -> None:
        """Write the record of a run that starts."""
        _write(folder, [started_from])

    @staticmethod
    def finish(folder: Path, steps: int, best: str) -> None:
        """Add to the record how the run ended. `best` is a path, or an empty string."""
        record = RunRecord.read(folder)
        lines = ["" if record is None else record.started_from, f"{_STEPS}{steps}"]
        if best:
            whole, of_run = Path(best).absolute(), folder.absolute()
            lines.append(f"{_BEST}{whole.relative_to(of_run) if whole.is_relative_to(of_run) else whole}")
        _write(folder, lines)


def _write(folder: Path, lines: list[str]) -> None:
    """Write the record whole or not at all: an empty one would make the next run start from the beginning."""
    path = folder / STARTED_FROM
    unfinished = path.with_name(f".{STARTED_FROM}.unfinished")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        rank_zero_warn(f"{path} could not be written ({error.strerror or error}). The run goes on without it.")
