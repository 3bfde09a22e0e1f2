"""The command line, through its own entry point."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torchvision.datasets import MNIST

from tests.conftest import ROOT

Run = Callable[..., tuple[int, str]]
SAMPLE = ("--data.source", "sample")
DEV = (*SAMPLE, "--trainer.fast_dev_run", "true")
CONFIGS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "configs").rglob("*.yaml")
    # tests/test_goldfish.py, tests/data/test_text.py, tests/test_ants_bees.py and tests/cli/test_init.py run those
    if "goldfish" not in path.name and path.name not in ("text.yaml", "images.yaml", "ants_bees.yaml", "own.yaml")
)


@pytest.fixture
def pretrained(a_base: Path) -> Path:
    """A base for every config that adapts one, where it looks for it."""
    Path("logs/notebook_pretrain").symlink_to("pretrain")
    return a_base


@pytest.mark.parametrize(
    "config", [pytest.param(path, marks=pytest.mark.slow) if "notebook" in path else path for path in CONFIGS]
)
def test_every_config_runs_as_it_is(run: Run, pretrained: Path, config: str) -> None:
    for command in ("fit", "validate", "test", "predict"):
        if command == "validate" and "notebook" in config:
            continue  # the notebook holds nothing out
        code, text = run(command, "-c", config, *DEV)
        assert code == 0, text


@pytest.mark.slow
def test_the_documented_sequence_runs_twice_without_editing_a_path(run: Run) -> None:
    text = (ROOT / "docs" / "mnist.md").read_text() + (ROOT / "docs" / "resuming.md").read_text()
    commands = re.findall(r"^lora-lightning (fit|test|merge) ((?!.*goldfish).*)$", text, re.MULTILINE)
    assert [command for command, _ in commands] == ["fit", "test", "fit", "test", "merge", "fit"]
    for _ in range(2):
        for command, words in commands:
            short = ("--trainer.max_steps", "10") if command == "fit" else ()
            code, output = run(command, *words.split(), *SAMPLE, *short)
            assert code == 0, output
            if command == "test":
                printed = output
            elif command == "merge":
                newest = max(Path("logs/adapt").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert len(list(Path("logs/pretrain").glob("version_*/checkpoints/*.ckpt"))) == 2
    assert len(list(Path("logs/adapt").glob("version_*/adapter/adapter_model.safetensors"))) == 4  # the last resumes
    assert {path.name for path in Path().glob("*.ckpt")} == {"merged.ckpt", "merged-v1.ckpt"}
    assert len(list(Path("logs").glob("*/version_*/confusion.json"))) == 4
    assert "before" in printed
    assert f"Checkpoint: {newest}" in " ".join(printed.split())


def test_a_run_keeps_its_resolved_config_and_the_seed_is_0(run: Run, pretrained: Path) -> None:
    config = yaml.safe_load((pretrained / "version_0" / "config.yaml").read_text())
    assert config["seed_everything"] == 0
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.003
    assert config["data"]["init_args"]["val_fraction"] == 0.1


def test_without_a_seed_in_the_config_it_is_0(run: Run, workspace: Path) -> None:
    Path("plain.yaml").write_text(
        "model: {class_path: lora_lightning.Classifier, "
        "init_args: {backbone: {class_path: lora_lightning.RichBoyNet}}}\n"
        "data: {class_path: lora_lightning.MNISTDataModule, init_args: {source: sample}}\n"
    )
    code, text = run("fit", "-c", "plain.yaml", "--trainer.fast_dev_run", "true")
    assert code == 0, text
    assert "Seed set to 0" in text


def test_a_seed_repeats_a_run_bitwise(run: Run, workspace: Path) -> None:
    states = []
    for seed in (1, 1, 2):
        words = (*SAMPLE, "--trainer.max_steps", "3", "--seed_everything", str(seed))
        assert run("fit", "-c", "configs/pretrain.yaml", *words)[0] == 0
        newest = max(Path("logs").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        states.append(torch.load(newest, weights_only=True)["state_dict"])
    first, again, other = states
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["backbone.linear1.weight"], other["backbone.linear1.weight"])


class TestBadInput:
    """One clear message, an exit code that is not zero, and nothing written."""

    @pytest.fixture(autouse=True)
    def _no_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])

    @pytest.mark.parametrize(
        ("words", "code", "message"),
        [
            (["--data.digits", "[12]"], 1, "digits=[12]: 12 is not a digit; expected whole numbers from 0 to 9."),
            (["--data.digits", "[]"], 1, "digits=[] selects nothing: name digits from 0 to 9"),
            (["--data.digits", "[3,3]"], 1, "digits=[3, 3] repeats a digit; name each once."),
            (["--data.digits", "[a]"], 2, "Parser key \"digits\": Expected a <class 'int'>. Got value: a"),
            (["--data.digitz", "[3]"], 2, "Option 'digitz' is not accepted. Did you mean 'digits'? It takes: data_dir"),
            (["--data.source", "full"], 1, "source=full: the full MNIST is not in data/MNIST/raw and could not be"),
            (["--ckpt_path", "no.ckpt"], 1, "no.ckpt does not exist; expected a checkpoint, or a log folder"),
            (["-c", "no.yaml"], 2, "File does not exist"),
            (
                ["--model.backbone.hidden_size_3", "7"],
                2,
                "Option 'hidden_size_3' is not accepted. Did you mean 'hidden_size_",
            ),
            (["--lora.rnk", "4"], 2, "There is no option --lora.rnk. Did you mean --lora.rank?\n"),
            (["--lora.rnk=4"], 2, "There is no option --lora.rnk. Did you mean --lora.rank?\n"),
            (["--rank", "4"], 2, "There is no option --rank. Did you mean --lora.rank?\n"),
            (["--max_epoch", "4"], 2, "There is no option --max_epoch. Did you mean --trainer.max_epochs?\n"),
            (["--confg", "a.yaml"], 2, "There is no option --confg. Did you mean --config?\n"),
            (["--cktp_path", "last"], 2, "There is no option --cktp_path. Did you mean --ckpt_path?\n"),
            (["--datta.digits", "[3]"], 2, "There is no option --datta.digits. Did you mean --data.digits?\n"),
            (["--lr", "4"], 2, "There is no option --lr. Settings have the name of their part in front, for example"),
            (["configs/adapt.yaml"], 2, "arguments: configs/adapt.yaml. Did you mean --config configs/adapt.yaml?\n"),
            (["-c", "configs/adapt.yml"], 2, "/configs/adapt.yml'. Did you mean configs/adapt.yaml?\n"),
            (["--lora.target_modules", "linear1,linear2"], 1, 'A list of names is written "[linear1,linear2]".\n'),
            (["--lora.modules_to_save", "linear1,linear2"], 1, 'A list of names is written "[linear1,linear2]".\n'),
            (["--data.digits", "3,4"], 2, 'Got value: 3,4. A list is written "[3,4]".\n'),
            (["--model.optimzer.lr", "4"], 2, "unrecognized arguments: --optimzer.lr=4. Did you mean 'optimizer'? It"),
        ],
    )
    def test_on_the_command_line(self, run: Run, words: list[str], code: int, message: str) -> None:
        outcome, text = run("fit", "-c", "configs/pretrain.yaml", *DEV, *words)
        assert outcome == code
        assert message in text
        assert "Traceback" not in text
        assert text.count("lora-lightning: error: ") == 1
        assert not Path("logs").exists()

    @pytest.mark.parametrize(
        ("words", "meant"),
        [(("merge", "--ouput", "a.ckpt"), "--output"), (("repair", "--focuss", "4"), "--focus")],
    )
    def test_a_misspelt_option_of_a_single_command(self, run: Run, words: tuple[str, ...], meant: str) -> None:
        code, text = run(*words)
        assert code == 2
        assert f"There is no option {words[1]}. Did you mean {meant}?\n" in text

    @pytest.mark.parametrize(
        ("config", "code", "message"),
        [
            ("rank: 0", 1, "rank=0: a LoRA rank is a whole number of at least 1, for example rank=8."),
            (
                "rnk: 1",
                2,
                (
                    "Option 'rnk' is not accepted. Did you mean 'rank'? It takes: config, base_checkpoint, "
                    "weights_only, adapter, checkpoints, verify, rank, alpha, dropout"
                ),
            ),
            ("target_modules: [linear9]", 1, "Targets ['linear9'] match no layer"),
            ("base_checkpoint: logs/no", 1, "logs/no does not exist; expected a checkpoint, or a log folder"),
        ],
    )
    def test_in_the_callbacks(self, run: Run, config: str, code: int, message: str) -> None:
        Path("lora.yaml").write_text(
            "trainer: {callbacks: [{class_path: lora_lightning.LoRAFinetuning, init_args: {" + config + "}}]}"
        )
        outcome, text = run("fit", "-c", "configs/pretrain.yaml", "-c", "lora.yaml", *DEV)
        assert outcome == code
        assert message in text
        assert "Traceback" not in text

    @pytest.mark.parametrize("command", ["fit", "test", "merge"])
    def test_no_configuration(self, run: Run, command: str) -> None:
        code, text = run(command)
        assert code == 2
        assert "There is no model. Name a configuration, --config FILE; `lora-lightning init` writes examples." in text

    def test_rates_without_brackets(self, run: Run) -> None:
        code, text = run("find-lr", "--config", "configs/adapt.yaml", "--rates", "0.1,1")
        assert code == 2
        assert 'Got value: 0.1,1. A list is written "[0.1,1]".\n' in text

    def test_a_base_in_place_of_adapters(self, run: Run, pretrained: Path) -> None:
        words = ("test", "-c", "configs/adapt.yaml", *SAMPLE, "--ckpt_path", "logs/pretrain")
        code, text = run(*words)
        assert code == 1
        (base,) = Path("logs/pretrain").rglob("*.ckpt")
        assert f"On the command line: --lora.base_checkpoint {base}; or add --adapter none" in text
        code, text = run(*words, "--adapter", "none")
        assert code == 0, text

    def test_adapters_in_place_of_a_base(self, run: Run, a_base_with_adapters: Path) -> None:
        code, text = run("test", "-c", "configs/pretrain.yaml", *SAMPLE, "--ckpt_path", str(a_base_with_adapters))
        assert code == 1
        saved = "--config logs/adapt/version_0/config.yaml"
        assert f"but not the network. Use the configuration of that run: {saved}; or create a plain" in text
        code, text = run("test", *saved.split(), "--ckpt_path", str(a_base_with_adapters))
        assert code == 0, text
        words = ("--ckpt_path", "last", "--trainer.logger.name", "adapt")
        code, text = run("test", "-c", "configs/pretrain.yaml", *SAMPLE, *words)
        assert code == 1
        assert "but not the network. Create the model" in text

    def test_a_key_of_the_trainer(self, run: Run) -> None:
        Path("bad.yaml").write_text("trainer: {max_epoch: 3}")
        code, text = run("fit", "-c", "configs/pretrain.yaml", "-c", "bad.yaml", *DEV)
        assert code == 2
        assert "does not accept option 'trainer.max_epoch'. Did you mean 'max_epochs'?" in text

    def test_a_base_of_another_shape(self, run: Run, pretrained: Path) -> None:
        words = ("--model.backbone.hidden_size_1", "7")
        code, text = run("fit", "-c", "configs/adapt.yaml", *SAMPLE, *words)
        assert code == 1
        assert "does not fit this Classifier: backbone.linear1.weight is (1000, 784), expected (7, 784)" in text

    def test_a_damaged_data_file(self, run: Run) -> None:
        raw = Path("data/MNIST/raw")
        raw.mkdir(parents=True)
        for part in ("train", "t10k"):
            for kind in ("images-idx3", "labels-idx1"):
                (raw / f"{part}-{kind}-ubyte").write_bytes(b"\0\0\x08")
        code, text = run("fit", "-c", "configs/pretrain.yaml")
        assert code == 1
        assert "data/MNIST/raw/train-images-idx3-ubyte is not an IDX file of 3 dimension(s)" in text

    def test_no_command_and_no_such_command(self, run: Run) -> None:
        for words in ([], ["fitt"]):
            code, text = run(*words)
            assert code == 2
            assert "fit" in text
            assert "Traceback" not in text

    def test_the_traceback_is_there_for_those_who_ask(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LORA_LIGHTNING_DEBUG", "1")
        with pytest.raises(ValueError, match="12 is not a digit"):
            run("fit", "-c", "configs/pretrain.yaml", *DEV, "--data.digits", "[12]")


def test_the_module_and_the_script_are_one_command() -> None:
    script = Path(sys.executable).with_name("lora-lightning")
    texts = [
        subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
        for command in ([script], [sys.executable, "-m", "lora_lightning"])
    ]
    assert "repair" in texts[0]
    assert texts[0] == texts[1]


@pytest.mark.slow  # tests/checkpoints/test_killed.py interrupts a `fit`
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_it_with_a_line_and_a_code(workspace: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_lightning", "repair", "--source", "sample", "--steps", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 300
    try:
        while not list(Path("logs").rglob("candidates/*/events*")):
            assert time.monotonic() < deadline, "it has not come to its second training in five minutes"
            time.sleep(0.2)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "lora-lightning: interrupted. All files written so far are kept." in text
    assert "Traceback" not in text
    (base,) = Path("logs").rglob("base/checkpoints/base.ckpt")
    assert f"To go on with the trained base: --base_checkpoint {base}\n" in text


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_runs_without_its_progress_bar_and_checkpoints(run: Run, pretrained: Path, config: str) -> None:
    words = ("--trainer.enable_progress_bar", "false", "--trainer.enable_checkpointing", "false")
    before = set(Path("logs").rglob("*.ckpt"))
    code, text = run("fit", "-c", config, *SAMPLE, "--trainer.max_steps", "2", *words)
    assert code == 0, text
    assert set(Path("logs").rglob("*.ckpt")) == before
    assert "Epoch" not in text


def test_a_training_that_diverges_ends_with_its_reason_and_no_adapter(run: Run, pretrained: Path) -> None:
    code, text = run("fit", "-c", "configs/adapt.yaml", *SAMPLE, "--model.optimizer.init_args.lr", "1e30")
    assert code == 1, text
    assert re.search(
        r"error: Training has diverged: 'linear1.lora_weight.default.lora_A', .* "
        r"contain NaN or infinity since batch \d+",
        text,
    )
    assert not list(Path("logs/adapt").rglob("adapter"))
