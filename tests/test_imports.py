"""Packages import one way, and no file imports itself through others."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from tests.conftest import ROOT

PACKAGE = ROOT / "lora_lightning"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in PACKAGE.rglob("*.py") if "sample" not in path.parts}


def imported_by(path: Path) -> set[str]:
    """Return our modules that a file imports, at the top or inside a function, but not for type checking alone."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in FILES else node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {name for name in found if name in FILES}


def test_no_file_imports_itself_through_others() -> None:
    # A package's `__init__` collects names of its own files for others, which is no circle.
    graph = {
        name: {other for other in imported_by(path) if not (path.name == "__init__.py" and other.startswith(name))}
        for name, path in FILES.items()
    }
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert len(order) >= len(FILES) - 1
