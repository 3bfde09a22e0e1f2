"""Finds, downloads, verifies and reads the files of MNIST, or reads the sample in the package."""

from __future__ import annotations

import gzip
import hashlib
import math
import socket
import struct
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchvision.datasets import MNIST

from lora_lightning.data.in_memory import InMemoryDataset

Source = Literal["auto", "full", "sample"]

_SPLITS = ("train", "t10k")
_DIGESTS = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
"""MD5 of the four unpacked files."""
_COUNTS = {"train": 60_000, "t10k": 10_000}
_PROBE_SECONDS = 5.0
_STALL_SECONDS = 10.0


@dataclass(frozen=True)
class MNISTFiles:
    """Reads both splits of the database and verifies them: images of shape (N, 28, 28), uint8, and digits, int64."""

    train: InMemoryDataset
    test: InMemoryDataset
    source: Literal["full", "sample"]


def prepare(data_dir: Path, source: Source, download: bool) -> str:
    """Download the full database if `source` requires it and it is missing. One process per machine calls this.

    Returns:
        The reason if `"auto"` could not get the full database, else an empty string.

    Raises:
        RuntimeError: If `source` is `"full"` and the database is missing and cannot be downloaded.
    """
    if source == "sample" or _is_on_disk(data_dir):
        return ""
    reason = _download(data_dir) if download else "download is switched off"
    if reason and source == "full":
        raise RuntimeError(
            f"source=full: the full MNIST is not in {_raw_folder(data_dir)} and could not be downloaded ({reason}). "
            "Copy its four files there, set data_dir to their folder, or use the embedded digits with source=sample."
        )
    return f"the full MNIST is not in {_raw_folder(data_dir)} and could not be downloaded: {reason}" if reason else ""


def read(data_dir: Path, source: Source) -> MNISTFiles:
    """Read the database for `source`. Call `prepare` first.

    Raises:
        FileNotFoundError: If `source` is `"full"` and a file is missing.
        ValueError: If a file is damaged.
    """
    if source == "sample" or (source == "auto" and not _is_on_disk(data_dir)):
        return MNISTFiles(_read_sample("train"), _read_sample("t10k"), "sample")
    return MNISTFiles(_read_full(data_dir, "train"), _read_full(data_dir, "t10k"), "full")


def _raw_folder(data_dir: Path) -> Path:
    return data_dir / "MNIST" / "raw"


def _file_names(split: str) -> tuple[str, str]:
    return f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"


def _is_on_disk(data_dir: Path) -> bool:
    return all((_raw_folder(data_dir) / name).is_file() for split in _SPLITS for name in _file_names(split))


def _read_sample(split: str) -> InMemoryDataset:
    folder = files("lora_lightning.data") / "sample"
    contents = [gzip.decompress((folder / f"{name}.gz").read_bytes()) for name in _file_names(split)]
    images, labels = (
        torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * dimensions)
        for content, dimensions in zip(contents, (3, 1), strict=True)
    )
    return InMemoryDataset(images.view(-1, 28, 28), labels.long())


def _read_full(data_dir: Path, split: str) -> InMemoryDataset:
    paths = [_raw_folder(data_dir) / name for name in _file_names(split)]
    counts = [_check_size(path, item) for path, item in zip(paths, ((28, 28), ()), strict=True)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"{paths[0]} contains {counts[0]} images, but {paths[1]} contains {counts[1]} labels. Remove both and run "
            "again to download them again."
        )
    if counts[0] == _COUNTS[split]:
        _warn_of_other_contents(paths)
    mnist = MNIST(data_dir, train=split == "train")
    _check_digits(mnist.targets, paths[1])
    return InMemoryDataset(mnist.data, mnist.targets)


def _check_size(path: Path, item: tuple[int, ...]) -> int:
    """Return the number of items in an IDX file, after comparing its header with its size.

    The header consists of two zero bytes, the type (8 for unsigned bytes), the number of dimensions, and each dimension
    as a big-endian 32-bit number. torchvision only checks the name of the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected the four files of MNIST in {path.parent}.")
    dimensions = 1 + len(item)
    with path.open("rb") as file:
        header = file.read(4 + 4 * dimensions)
    advice = "Remove it and run again to download it."
    if len(header) < 4 + 4 * dimensions or header[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(
            f"{path} is not an IDX file of {dimensions} dimension(s): it starts with {header[:4]!r}. {advice}"
        )
    count, *shape = struct.unpack(f">{dimensions}I", header[4:])
    expected = len(header) + count * math.prod(item)
    if tuple(shape) != item or count == 0:
        raise ValueError(f"{path} contains {count} items of shape {tuple(shape)}; expected shape {item}. {advice}")
    if path.stat().st_size != expected:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, and {expected} according to its header: it is truncated or "
            f"damaged. {advice}"
        )
    return int(count)


def _warn_of_other_contents(paths: list[Path]) -> None:
    """Warn if files in the right format have contents other than MNIST's."""
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if digest != _DIGESTS[path.name]:
            rank_zero_warn(
                f"{path} is not the file of MNIST (MD5 {digest}, expected {_DIGESTS[path.name]}): it is damaged, or "
                "belongs to another data set. To download the file of MNIST, remove it and run again."
            )


def _check_digits(targets: Tensor, path: Path) -> None:
    if int(targets.max()) > 9:
        raise ValueError(f"{path} contains the label {int(targets.max())}; expected digits from 0 to 9.")


def _download(data_dir: Path) -> str:
    """Download the files with torchvision, including its checksums.

    Returns:
        The reason of a failure, or an empty string.
    """
    if reason := _unreachable(MNIST.mirrors):
        return reason
    try:
        with _socket_timeout(_STALL_SECONDS):
            MNIST(data_dir, download=True)
    except (RuntimeError, OSError) as error:
        return " ".join(str(error).split())
    return ""


def _unreachable(mirrors: list[str]) -> str:
    """Return the reason why the first mirror is not reachable, or an empty string if one is."""
    reasons = []
    for url in mirrors:
        try:
            request = urllib.request.Request(f"{url}{MNIST.resources[3][0]}", method="HEAD")
            with urllib.request.urlopen(request, timeout=_PROBE_SECONDS):
                return ""
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            timed_out = isinstance(reason, TimeoutError)
            reasons.append(f"{url}: {f'no answer within {_PROBE_SECONDS:g} s' if timed_out else reason}")
    return reasons[0] if reasons else ""


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Set a timeout for torchvision's download, which has none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
