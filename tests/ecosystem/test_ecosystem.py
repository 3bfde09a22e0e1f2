"""Fine-tuning in libraries on top of Lightning, each in its own environment: `pytest -m ecosystem -n 1 -s -k darts`.

uv makes the environments if it is there, and else venv and pip. `docs/ecosystem.md` says what was seen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

HANGS = 3600  # seconds, many times what an installation takes
LIBRARIES = {
    "chemprop": ["chemprop"],
    "darts": ["darts[torch]"],
    "gluonts": ["gluonts[torch]"],
    "matgl": ["matgl"],
    "pytorch_tabular": ["pytorch-tabular", "requests"],  # which 1.2.0 imports and does not declare
    "scvi": ["scvi-tools"],
}
"""What to install, by the name of the script."""


def run(folder: Path, *words: str | Path) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, words)), cwd=folder, env=variables, capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def environment() -> Iterator[Path]:
    """A folder for an environment, which is removed afterwards: it takes gigabytes."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "environment"


def install(environment: Path, *packages: str) -> Path:
    """Make an environment with packages and this project, and return its Python."""
    python = environment / "bin" / "python"
    if uv := shutil.which("uv"):
        run(ROOT, uv, "venv", "--quiet", "--python", sys.executable, environment)
        run(ROOT, uv, "pip", "install", "--quiet", "--python", python, *packages, "-e", ROOT)
    else:
        run(ROOT, sys.executable, "-m", "venv", environment)
        run(ROOT, python, "-m", "pip", "install", "--quiet", *packages, "-e", ROOT)
    return python


@pytest.mark.ecosystem
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_model_is_fine_tuned_and_saved_and_read_where_this_package_is_unknown(
    library: str, environment: Path, tmp_path: Path
) -> None:
    python = install(environment, *LIBRARIES[library])
    script = Path(__file__).with_name(f"run_{library}.py")
    print(run(tmp_path, python, script, "fit", tmp_path))
    print(run(tmp_path, python, script, "load", tmp_path))
