"""Reads the weights of a network from a file and verifies them."""

from __future__ import annotations

import hashlib
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models._api import WeightsEnum

from lora_lightning.checkpoints.checkpoints import check_file, explain_damage, misfits

_HASH = re.compile(r"-([0-9a-f]{8,64})\.")


def check_name(path: Path, *, of_torchvision: bool = False) -> None:
    """Compare a file with the SHA-256 hash in its name, in torchvision's format: `vgg19-dcbb9e9d.pth`.

    Args:
        path: The file. A name without a hash is not compared.
        of_torchvision: Whether torchvision chose the name. The hash of some of its files has no letters
            (`vgg13-19584684.pth`); in other names, such a number may be a date and is not compared.

    Raises:
        ValueError: If they differ.
    """
    found = _HASH.search(path.name)
    if found is None:
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(found[1]) and (of_torchvision or not found[1].isdecimal()):
        raise ValueError(
            f"{path} is damaged, or another file: its SHA-256 starts with {digest[: len(found[1])]} instead of "
            f"{found[1]}, as in its name. Remove it, and download it again."
        )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file without running code from it.

    Raises:
        ValueError: If the file is damaged or contains something else.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged or not a safetensors file ({error}). Choose another one.") from None
    with explain_damage(path):
        in_archive = zipfile.is_zipfile(path)  # the oldest files of torchvision are not
    if in_archive:
        check_file(path)
    with explain_damage(path):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values()):
        return content
    found = f"a dictionary of {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) else type(content)
    raise ValueError(
        f"{path} contains {found}; expected a state dict with only names and tensors. Pass a Lightning checkpoint as "
        "base_checkpoint of LoRAFinetuning."
    )


def load_strictly(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict with exactly the names and shapes of the network.

    Raises:
        ValueError: If they differ. The network is then unchanged.
    """
    expected = network.state_dict()
    for key in expected.keys() - state.keys():
        if key.endswith("num_batches_tracked"):  # missing in files of old versions
            state[key] = expected[key]
    if wrong := misfits(state, expected):
        raise ValueError(f"{path} does not fit this {type(network).__name__}: {wrong}. Choose other weights.")
    network.load_state_dict(state)


def copy_of_download(path: Path, entries: Iterable[WeightsEnum]) -> WeightsEnum | None:
    """Return torchvision's weights for the name of this file, or `None` if there are none."""
    return next((entry for entry in entries if _file_name(entry) == path.name), None)


def through_torchvision(builder: Callable[..., nn.Module], entry: WeightsEnum, copy: Path | None) -> nn.Module:
    """Build a network with torchvision's weights from its download folder or a copy of the file.

    torchvision verifies the hash of a download. This function also verifies existing files.

    Raises:
        ValueError: If the file does not match the hash in its name.
        RuntimeError: If the file cannot be downloaded.
    """
    folder = Path(torch.hub.get_dir())
    file = copy or folder / "checkpoints" / _file_name(entry)
    if file.exists():
        check_name(file, of_torchvision=True)
    if copy is None:
        return _build(builder, entry, file)
    with tempfile.TemporaryDirectory() as hub_folder:
        (Path(hub_folder) / "checkpoints").mkdir()
        (Path(hub_folder) / "checkpoints" / _file_name(entry)).symlink_to(copy.resolve())
        torch.hub.set_dir(hub_folder)
        try:
            return _build(builder, entry, file)
        finally:
            torch.hub.set_dir(folder)


def _build(builder: Callable[..., nn.Module], entry: WeightsEnum, file: Path) -> nn.Module:
    try:
        return builder(weights=entry)
    except URLError as error:
        raise RuntimeError(
            f"{entry.url} cannot be downloaded ({error.reason}). Save the file as {file}, set weights to its path, or "
            "use weights: null for random ones."
        ) from None
    except RuntimeError as error:
        if "invalid hash value" not in str(error):
            raise
        raise ValueError(
            f"{entry.url}: the downloaded file does not match the checksum in its name ({error})."
        ) from None


def _file_name(entry: WeightsEnum) -> str:
    return Path(urlparse(entry.url).path).name


def none_of_words(weights: str | None) -> str | None:
    """Return `None` for the string that the command line passes for `null` in a nested option (jsonargparse 4.53)."""
    return None if weights == "None" else weights
