"""Folders whose author may mean harm."""

from __future__ import annotations

import json
import re
from pathlib import Path
from time import monotonic

import pytest
from torch import nn

from lora_lightning import LoRAConfig, load_adapter, save_adapter
from lora_lightning.lora import attach, is_adapted

BACKTRACKS = r"(\w|\w\w)+[^\w]"
"""Takes time that grows exponentially with the length of a name."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_output_dense_projection = nn.Linear(3, 3)


class ShortBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_output_dense_1 = nn.Linear(3, 3)


def folder_with(pattern: str, key: str, net: nn.Module, path: Path) -> Path:
    """Return an adapter folder for `net` whose configuration has this pattern."""
    attach(net, LoRAConfig(rank=1))
    save_adapter(net, path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {key: {pattern: 1}}))
    return path


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_backtracks_for_ever_is_refused_by_name(key: str, tmp_path: Path) -> None:
    folder = folder_with(BACKTRACKS, key, nn.Sequential(Block()), tmp_path / "adapter")
    net, start = nn.Sequential(Block()), monotonic()
    with pytest.raises(ValueError, match=re.escape(repr(BACKTRACKS))):
        load_adapter(net, folder)
    assert monotonic() - start < 30
    assert not is_adapted(net)


def test_a_pattern_that_takes_a_while_for_each_of_many_layers_is_refused(tmp_path: Path) -> None:
    blocks = nn.Sequential(*(ShortBlock() for _ in range(200)))
    folder = folder_with(BACKTRACKS, "rank_pattern", blocks, tmp_path / "adapter")
    start = monotonic()
    with pytest.raises(ValueError, match=re.escape(repr(BACKTRACKS))):
        load_adapter(nn.Sequential(*(ShortBlock() for _ in range(200))), folder)
    assert monotonic() - start < 30


@pytest.mark.filterwarnings("ignore:.*has changed since", "ignore:.*was trained on another base")
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_only_looks_slow_is_matched(key: str, tmp_path: Path) -> None:
    folder = folder_with(r"(\w+_?)+!", key, nn.Sequential(Block()), tmp_path / "adapter")
    start = monotonic()
    load_adapter(nn.Sequential(Block()), folder)
    assert monotonic() - start < 30
