"""Files that were truncated, flipped, emptied or swapped: each is refused, or noticed, and none runs code.

Every format takes 500 mutations, drawn with fixed seeds; configurations take 40 and in `pytest -m slow` 160.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import pickle
import random
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_lightning import LoRAConfig, load_adapter, save_adapter
from lora_lightning.checkpoints import read_checkpoint
from lora_lightning.data import mnist_files
from lora_lightning.data.images import read_image
from lora_lightning.lora import adapter_state_dict, attach, base_fingerprint, is_adapted
from lora_lightning.models.weights import check_name, load_strictly, read_weights

MUTATIONS = 500
Run = Callable[..., tuple[int, str]]


class Bomb:
    """Runs code when it is unpickled by a loader that lets it."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("exploded"),)


def mutated(content: bytes, seed: int) -> bytes:
    """One of: truncated, emptied, bits flipped, a block overwritten, a piece cut out or doubled, a huge number."""
    choose = random.Random(seed)
    data, kind = bytearray(content), choose.randrange(7)
    at = choose.randrange(len(data))
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        for _ in range(choose.choice([1, 1, 3, 50])):
            data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    elif kind == 2:
        data[at : at + 16] = choose.randbytes(16)
    elif kind == 3:
        del data[at : at + choose.randrange(1, 64)]
    elif kind == 4:
        data[at:at] = data[at : at + choose.randrange(1, 64)]
    elif kind == 5:
        data[at : at + 8] = struct.pack("<Q", choose.choice([2**31 - 1, 2**40, 2**63 - 1]))
    else:
        return choose.choice([b"", b"\x00" * len(data), choose.randbytes(len(data)), pickle.dumps(Bomb())])
    return bytes(data)


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return (
            isinstance(second, dict) and list(first) == list(second) and all(same(first[k], second[k]) for k in first)
        )
    if isinstance(first, list | tuple):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and bool(first == second)


@pytest.fixture(autouse=True)
def _nothing_explodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("exploded").exists(), "code from a file was run"


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))


def test_checkpoints(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "epoch": 3,
        "loops": {"a": [1]},
    }
    torch.save(content, file := io.BytesIO())
    messages: list[str] = []
    for seed in range(MUTATIONS):
        path = tmp_path / "mutated.ckpt"
        path.write_bytes(mutated(file.getvalue(), seed))
        try:
            loaded = read_checkpoint(path)
        except ValueError as error:
            messages.append(str(error))
        else:
            assert same(loaded, content), f"mutation {seed} is accepted and wrong"
    assert len(messages) > MUTATIONS // 2
    assert all("mutated.ckpt is damaged or not a checkpoint" in message for message in messages)


def test_adapter_folders(tmp_path: Path) -> None:
    model = net()
    attach(model, LoRAConfig(rank=2, alpha=3))
    nn.init.normal_(model[0].lora_weight.default.lora_B)
    save_adapter(model, tmp_path / "good")
    good, digest = adapter_state_dict(model), base_fingerprint(model)
    files = {path.name: path.read_bytes() for path in (tmp_path / "good").glob("adapter_*")}  # README.md is for people
    refused: dict[str, list[str]] = {name: [] for name in files}
    untouched = True
    for name, content in files.items():
        for seed in range(MUTATIONS):
            folder = tmp_path / "mutated"
            folder.mkdir(exist_ok=True)
            for other, bytes_of_other in files.items():
                (folder / other).write_bytes(mutated(content, seed) if other == name else bytes_of_other)
            target = net()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    load_adapter(target, folder)
                except (ValueError, FileNotFoundError) as error:
                    refused[name].append(str(error))
                    untouched &= not is_adapted(target)
                    untouched &= all(parameter.requires_grad for parameter in target.parameters())
                else:
                    noticed = any("has changed since the adapter was written" in str(w.message) for w in caught)
                    assert noticed or same(adapter_state_dict(target), good), (
                        f"mutation {seed} of {name} is accepted and wrong"
                    )
                    assert noticed or target[0].lora_weight.default.scaling == 1.5
            assert base_fingerprint(target) == digest
    assert all(len(messages) > MUTATIONS // 3 for messages in refused.values())
    assert all("mutated" in message for messages in refused.values() for message in messages)
    assert untouched


def test_idx_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "t10k"):
        images = torch.randint(256, (20, 28, 28), dtype=torch.uint8, generator=generator)
        labels = torch.arange(20, dtype=torch.uint8) % 10
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, 20, 28, 28) + images.numpy().tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, 20) + labels.numpy().tobytes())
    files = {path: path.read_bytes() for path in raw.iterdir()}
    monkeypatch.setattr(mnist_files, "_COUNTS", {"train": 20, "t10k": 20})
    digests = {path.name: mnist_files.hashlib.md5(content).hexdigest() for path, content in files.items()}
    monkeypatch.setattr(mnist_files, "_DIGESTS", digests)
    good = mnist_files.read(tmp_path, "full")
    messages: list[str] = []
    for seed in range(MUTATIONS):
        path = sorted(files)[seed % 4]
        path.write_bytes(mutated(files[path], seed))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                read = mnist_files.read(tmp_path, "full")
            except (ValueError, FileNotFoundError) as error:
                messages.append(f"{path.name}: {error}")
            else:
                unchanged = same(read.train.inputs, good.train.inputs) and same(read.train.targets, good.train.targets)
                unchanged &= same(read.test.inputs, good.test.inputs) and same(read.test.targets, good.test.targets)
                noticed = any(f"{path.name} is not the file of MNIST" in str(w.message) for w in caught)
                assert noticed or unchanged, f"mutation {seed} is accepted and wrong"
        path.write_bytes(files[path])
    assert len(messages) > MUTATIONS // 3
    assert all(message.count(message.split(":")[0]) > 1 or "labels" in message for message in messages)


@pytest.mark.filterwarnings("ignore")  # of EXIF data that a mutation made odd
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_images(kind: str, tmp_path: Path) -> None:
    """Each is read, if perhaps with other pixels, where its format has no checksum, or refused by name."""
    noise = torch.randint(256, (24, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise.numpy()).save(file := io.BytesIO(), format=kind, exif=exif)
    path, messages = tmp_path / "mutated.jpg", []
    for seed in range(MUTATIONS):
        path.write_bytes(mutated(file.getvalue(), seed))
        try:
            image = read_image(path)
        except ValueError as error:
            messages.append(str(error))
        else:
            assert image.mode == "RGB"
            assert 0 < image.width * image.height <= Image.MAX_IMAGE_PIXELS
    assert len(messages) > MUTATIONS // 4
    expected = (f"{path} is damaged, or not a JPEG", f"{path} has more than")
    assert all(message.startswith(expected) for message in messages)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # which a mutation made another
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_of_a_backbone(suffix: str, tmp_path: Path) -> None:
    """With the hash in their name, whatever was mutated is noticed; without it, nothing runs code."""
    state = net().state_dict()
    torch.save(state, tmp_path / "good.pth")
    save_file(state, tmp_path / "good.safetensors")
    content = (tmp_path / f"good.{suffix}").read_bytes()
    named = tmp_path / f"net-{hashlib.sha256(content).hexdigest()[:16]}.{suffix}"
    plain = tmp_path / f"mutated.{suffix}"
    for seed in range(MUTATIONS):
        data = mutated(content, seed)
        named.write_bytes(data)
        if data != content:
            with pytest.raises(ValueError, match="is damaged, or another file"):
                check_name(named)
        plain.write_bytes(data)
        with contextlib.suppress(ValueError):
            load_strictly(net(), read_weights(plain), plain)


@pytest.mark.filterwarnings("ignore")  # of values that a mutation made odd; the outcome is what counts
@pytest.mark.parametrize("mutations", [15, pytest.param(160, marks=pytest.mark.slow)])
def test_configurations(run: Run, tmp_path: Path, mutations: int) -> None:
    content = Path("configs/adapt.yaml").read_bytes()
    good = yaml.safe_load(content)
    for seed in range(mutations):
        text = mutated(content, seed)
        try:
            if yaml.safe_load(text) == good:
                continue
        except (yaml.YAMLError, ValueError, UnicodeDecodeError):
            pass
        path = tmp_path / "mutated.yaml"
        path.write_bytes(text)
        try:
            code, output = run("fit", "--config", str(path), "--print_config")
        except SystemExit:  # what it does once it has printed a configuration that it understood
            continue
        if code:
            lines = [line for line in output.splitlines() if line.startswith("lora-lightning: error: ")]
            assert len(lines) == 1, output
            assert "Traceback" not in output


def test_a_checkpoint_with_code_in_it_is_refused_by_the_command_line(run: Run, workspace: Path) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": Bomb()}, "bomb.ckpt")
    Path("base.yaml").write_text(Path("configs/adapt.yaml").read_text().replace("logs/pretrain", "bomb.ckpt"))
    for words in (("test", "-c", "configs/pretrain.yaml", "--ckpt_path", "bomb.ckpt"), ("fit", "-c", "base.yaml")):
        code, output = run(*words, "--data.source", "sample")
        assert code == 1
        assert "lora-lightning: error: bomb.ckpt refers to getattr, which is not read with weights_only=True" in output


def test_a_damaged_configuration_of_an_adapter_names_the_file(tmp_path: Path) -> None:
    model = net()
    attach(model, LoRAConfig(rank=2))
    save_adapter(model, tmp_path)
    description = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(description | {"lora_alpha": 4}))
    with pytest.warns(UserWarning, match=r"adapter_config.json has changed since the adapter was written"):
        load_adapter(copy.deepcopy(net()), tmp_path)
