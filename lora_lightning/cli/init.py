"""Writes example configurations without importing PyTorch."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
# They are inside the package in a wheel, and next to it in a clone of the repository.
_SHIPPED = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent
TOPICS = {
    "mnist": ("pretrain a network on MNIST, adapt it to a digit", ("configs/pretrain.yaml", "configs/adapt.yaml")),
    "images": ("adapt a network of torchvision to a folder of images", ("configs/images.yaml",)),
    "text": ("adapt a model of the transformers library to labelled texts", ("configs/text.yaml",)),
    "own": ("adapt a LightningModule of your own", ("configs/own.yaml", "own_module.py")),
}


def shipped(name: str) -> Path:
    """Return the path of an example file in the package, whether it exists or not."""
    return _SHIPPED / ("examples" if name.endswith(".py") else ".") / name


def how_to_get(path: str) -> str:
    """Return a sentence that says where to get a missing example file, or an empty string for other files."""
    parts = Path(path).parts
    if "configs" not in parts:
        return ""
    name = "/".join(parts[parts.index("configs") :])
    for topic, (_, names) in TOPICS.items():
        if name in names:
            return f"`lora-lightning init {topic}` writes it."
    return f"The package contains it: {shipped(name)}." if shipped(name).is_file() else ""


def init(words: list[str]) -> int:
    """Copy the files of a topic to the working directory and print the commands that use them.

    Args:
        words: The topic.

    Returns:
        The exit code: 0, or 2 if the topic does not exist or a file already exists, which is then not changed.
    """
    if len(words) != 1 or words[0] not in TOPICS:
        print("usage: lora-lightning init <topic>\n")
        for topic, (what, _) in TOPICS.items():
            print(f"  {topic:<10}{what}")
        return 0 if words in ([], ["--help"], ["-h"]) else 2
    _, names = TOPICS[words[0]]
    if there := [name for name in names if Path(name).exists()]:
        verbs = "exist and are not changed" if len(there) > 1 else "exists and is not changed"
        print(
            f"lora-lightning: error: {', '.join(there)} {verbs}. Delete or rename to start again, or go on:",
            file=sys.stderr,
        )
        print(_commands(names), file=sys.stderr)
        return 2
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        shutil.copyfile(shipped(name), name)
    print(f"Written: {', '.join(names)}. Next:\n{_commands(names)}")
    return 0


def _commands(names: Iterable[str]) -> str:
    """Return the commands in the first lines of shipped files."""
    lines = [line for name in names for line in shipped(name).read_text(encoding="utf-8").splitlines()]
    return "\n".join(f"  {line[1:].strip()}" for line in lines if line.startswith("#   "))
