"""Plants faults and lists which test catches each.

The command is `python -m tests.benchmarks.faults --count 30 --seed 0 [pytest arguments]`.

A fault changes an operator or a constant, or drops a statement, in one line of `lora/`, `callbacks/`, `evaluation/`,
`report/` or `checkpoints/`. It is planted in a copy of the project, whose default suite then runs until its first
failure. What survives changes nothing, or shows a guarantee without a test.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("lora", "callbacks", "evaluation", "report", "checkpoints")
SURVIVED = "survived"
_SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Lt: ast.GtE,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True)
class Fault:
    """Holds a changed file, and what was changed in which line."""

    path: Path
    line: int
    description: str
    source: str


def places_of(path: Path) -> list[tuple[Path, int]]:
    """Return the nodes of a file that can have a fault, by their index in `ast.walk`."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    return [(path, index) for index, node in enumerate(nodes) if _change(node)]


def fault_at(path: Path, index: int) -> Fault:
    """Return the file with a fault in the node at this index."""
    tree = ast.parse(path.read_text())
    node = list(ast.walk(tree))[index]
    line = int(getattr(node, "lineno", 0))
    return Fault(path, line, _change(node), ast.unparse(tree))


def _change(node: ast.AST) -> str:
    """Change a node, and return what was changed, or an empty string if it cannot have a fault."""
    if isinstance(node, ast.BinOp | ast.BoolOp) and (other := _SWAPPED.get(type(node.op))) is not None:
        before, node.op = type(node.op).__name__, other()  # type: ignore[assignment]
        return f"{before} -> {other.__name__}"
    if isinstance(node, ast.Compare) and (other := _SWAPPED.get(type(node.ops[0]))) is not None:
        before, node.ops[0] = type(node.ops[0]).__name__, other()  # type: ignore[call-overload]
        return f"{before} -> {other.__name__}"
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        value = node.value
        node.value = not value if isinstance(value, bool) else value + 1
        return f"{value} -> {node.value}"
    if isinstance(node, ast.If | ast.FunctionDef | ast.For | ast.With) and len(node.body) > 1:
        last = node.body[-1]
        is_docstring = isinstance(getattr(last, "value", None), ast.Constant)
        if isinstance(last, ast.Expr | ast.Assign | ast.AugAssign) and not is_docstring:
            return f"dropped: {ast.unparse(node.body.pop())}"
    return ""


def caught_by(fault: Fault, arguments: list[str]) -> str:
    """Run the suite on a copy of the project with this fault, and return the test that failed first.

    The tests of the room of the fault run before all others.
    """
    room = f"tests/{fault.path.relative_to(ROOT / 'lora_lightning').parts[0]}"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "logs", ".venv", "results", "*.pyc"))
        (copy / fault.path.relative_to(ROOT)).write_text(fault.source)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
        for tests in ([room], ["tests", f"--ignore={room}"]):
            done = subprocess.run(
                [*command, *tests],
                cwd=copy,
                env=os.environ | {"PYTHONPATH": str(copy)},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
                return (failed or ["does not start"])[0]
    return SURVIVED


def main() -> None:
    """Draw faults, plant each, and print what caught it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options, arguments = parser.parse_known_args()
    paths = sorted(path for room in ROOMS for path in (ROOT / "lora_lightning" / room).glob("*.py"))
    places = [place for path in paths for place in places_of(path)]
    drawn = random.Random(options.seed).sample(places, options.count)
    caught = 0
    for path, index in drawn:
        fault = fault_at(path, index)
        test = caught_by(fault, arguments)
        caught += test != SURVIVED
        print(f"{fault.path.relative_to(ROOT)}:{fault.line}: {fault.description}: {test}", flush=True)
    print(f"{caught} of {len(drawn)} caught")


if __name__ == "__main__":
    main()
