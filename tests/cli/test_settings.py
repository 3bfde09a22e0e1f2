"""Settings as options, configurations that work later, and images of one's own in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from lora_lightning import Classifier, LoRAConfig, LoRAFinetuning, RichBoyNet
from lora_lightning.cli.lightning_cli import LoRALightningCLI
from lora_lightning.cli.lora_options import is_lora_finetuning
from lora_lightning.cli.main import main
from tests import processes
from tests.conftest import ROOT

Run = Callable[..., tuple[int, str]]
SMALL = ("--data.source", "sample", "--trainer.max_steps", "10", "--trainer.max_epochs", "1")


@pytest.fixture
def pretrained(run: Run, a_base: Path) -> Run:
    return run


def adapters_in(config: Path) -> dict[str, Any]:
    """The arguments of LoRAFinetuning in a saved configuration."""
    callbacks = yaml.safe_load(config.read_text())["trainer"]["callbacks"]
    (found,) = [callback["init_args"] for callback in callbacks if callback["class_path"].endswith("LoRAFinetuning")]
    return dict(found)


def test_settings_of_adapters_are_options(pretrained: Run) -> None:
    words = ("--lora.rank", "3", "--lora.target_modules", "[linear1]", "--lora.base_checkpoint", "logs/pretrain")
    code, text = pretrained("fit", "--config", "configs/adapt.yaml", *SMALL, *words, "--data.focus", "9")
    assert code == 0, text
    assert "linear1: 784 -> 1000, rank 3" in text
    assert "linear2:" not in text
    found = adapters_in(Path("logs/adapt/version_0/config.yaml"))
    assert (found["rank"], found["target_modules"]) == (3, ["linear1"])
    assert "lora" not in yaml.safe_load(Path("logs/adapt/version_0/config.yaml").read_text())


def test_sizes_of_query_key_and_value_are_an_option(pretrained: Run) -> None:
    words = ("--config", "configs/adapt.yaml", *SMALL, "--lora.base_checkpoint", "logs/pretrain", "--data.focus", "9")
    words += ("--lora.target_modules", "[linear3]", "--lora.rank", "2", "--lora.qkv", "qv")
    code, text = pretrained("fit", *words, "--lora.qkv_sizes", "[6, 2, 2]")
    assert code == 0, text
    assert adapters_in(Path("logs/adapt/version_0/config.yaml"))["qkv_sizes"] == [6, 2, 2]
    tensors = load_file("logs/adapt/version_0/adapter/adapter_model.safetensors")
    (b,) = (value for key, value in tensors.items() if "lora_B" in key)
    assert [bool(part.any()) for part in b.split([6, 2, 2])] == [True, False, True]
    code, text = pretrained("fit", *words, "--lora.qkv_sizes", "[6, 2, 4]")
    assert code != 0
    assert "Layer 'linear3' has 10 outputs: expected 6 + 2 + 4 = 12" in text


def test_new_adapters_are_trained_beside_frozen_ones_of_folders(pretrained: Run) -> None:
    words = ("--config", "configs/adapt.yaml", *SMALL, "--lora.base_checkpoint", "logs/pretrain", "--data.focus", "9")
    code, text = pretrained("fit", *words, "--lora.rank", "2")
    assert code == 0, text
    Path("logs/adapt/version_0/adapter").rename("first")
    code, text = pretrained("fit", *words, "--lora.rank", "1", "--lora.adapter", "[first]")
    assert code == 0, text
    assert "linear1 (first): 784 -> 1000, rank 2, scale 1, 3,568 parameters, frozen" in text
    assert "linear1 (default): 784 -> 1000, rank 1, scale 1, 1,784 parameters" in text
    assert adapters_in(Path("logs/adapt/version_1/config.yaml"))["adapter"] == ["first"]
    code, text = pretrained("fit", *words, "--lora.rank", "1", "--lora.adapter", "first")
    assert code != 0
    assert "or name the folder in a list to keep these adapters frozen and train new ones beside them" in text


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize(
    "config", sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))
)
def test_the_options_work_with_every_shipped_configuration(
    workspace: Path, config: str, monkeypatch: pytest.MonkeyPatch, small_efficientnet: None
) -> None:
    (workspace / "own_module.py").symlink_to(ROOT / "examples" / "own_module.py")
    photographs(Path("photos"), "cats", "dogs")
    Path("data/banking77").mkdir(parents=True)
    Path("data/banking77/train.csv").write_text("text,category\na,b\nc,d\n")
    monkeypatch.setattr(LoRALightningCLI, "instantiate_classes", lambda self: None)  # which would download weights
    monkeypatch.setattr(LoRALightningCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr(LoRALightningCLI, "_add_configure_optimizers_method_to_model", lambda self, subcommand: None)
    cli = LoRALightningCLI(["fit", "--config", config, "--lora.rank", "3", "--lora.target_modules", "[fc]"])
    (ours,) = filter(is_lora_finetuning, cli.settings.trainer.callbacks)
    assert (ours.init_args.rank, ours.init_args.target_modules) == (3, ["fc"])


def test_the_options_bring_the_callback_where_none_is_configured(pretrained: Run) -> None:
    code, text = pretrained("fit", "--config", "configs/pretrain.yaml", *SMALL, "--lora.rank", "2")
    assert code == 0, text
    assert adapters_in(Path("logs/pretrain/version_1/config.yaml"))["rank"] == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # and Lightning says so
def test_runs_without_a_logger_keep_the_configurations_of_each_other(pretrained: Run) -> None:
    words = ("--config", "configs/adapt.yaml", *SMALL, "--trainer.logger", "false")
    for rank in ("2", "3"):
        code, text = pretrained("fit", *words, "--lora.rank", rank)
        assert code == 0, text
    code, text = pretrained("test", *words, "--lora.rank", "3", "--ckpt_path", "checkpoints")
    assert code == 0, text
    assert [adapters_in(Path(name))["rank"] for name in ("config.yaml", "config-v1.yaml", "config-v2.yaml")] == [
        2,
        3,
        3,
    ]


def test_every_setting_has_an_option_and_they_come_first_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    names = [*LoRAConfig.__dataclass_fields__, "base_checkpoint", "adapter", "verify"]
    places = [text.rindex(f"--lora.{name} ") for name in names]
    assert places == sorted(places)
    assert max(places) < text.rindex("--trainer.accelerator")
    assert "Rank r. It is lowered to min(in, out)" in " ".join(text.split())


def test_a_value_that_is_none_of_the_kind_is_refused_with_the_option(run: Run) -> None:
    code, text = run("fit", "--config", "configs/pretrain.yaml", *SMALL, "--lora.rank", "many")
    assert code == 2
    assert "lora.rank" in text
    assert "many" in text


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "predict"])
def test_a_run_s_own_configuration_works_later_with_every_command(pretrained: Run, command: str) -> None:
    """Also when there is a newer base by then, and when it is the configuration of a prediction."""
    code, text = pretrained("fit", "--config", "configs/adapt.yaml", *SMALL)
    assert code == 0, text
    base = adapters_in(Path("logs/adapt/version_0/config.yaml"))["base_checkpoint"]
    assert Path(base).is_file()
    code, text = pretrained("fit", "--config", "configs/pretrain.yaml", *SMALL, "--seed_everything", "1")
    assert code == 0, text
    (checkpoint,) = map(str, Path("logs/adapt/version_0").rglob("*.ckpt"))
    config = "logs/adapt/version_0/config.yaml"
    if command == "predict":
        code, text = pretrained("predict", "--config", config, "--ckpt_path", checkpoint)
        assert code == 0, text
        config = "logs/adapt/version_1/config.yaml"
    for later in ("validate", "test", "predict"):
        code, text = pretrained(later, "--config", config, "--ckpt_path", checkpoint)
        assert code == 0, text
    code, text = pretrained("merge", "--config", config, "--ckpt_path", checkpoint, "--output", "merged.ckpt")
    assert code == 0, text
    code, text = pretrained("fit", "--config", config, "--ckpt_path", checkpoint, "--trainer.max_steps", "12")
    assert code == 0, text
    assert f"Base: {base}" in text


def test_a_configuration_that_does_not_fit_the_checkpoint_is_answered_with_the_one_that_does(
    run: Run, a_base_with_adapters: Path
) -> None:
    words = (*SMALL[:2], "--ckpt_path", "logs/adapt")
    code, text = run("test", "--config", "configs/adapt.yaml", *words, "--lora.rank", "4")
    assert code == 1
    saved = "--config logs/adapt/version_0/config.yaml"
    assert "contains adapters that differ from those of the model. In the checkpoint: backbone.linear1 (rank 1" in text
    assert f" Use the configuration of that run: {saved}\n" in text
    assert "Configure LoRAFinetuning" not in text
    code, text = run("test", *saved.split(), *words)
    assert code == 0, text
    code, text = run("fit", "--config", "configs/pretrain.yaml", *SMALL)
    assert code == 0, text
    code, text = run("test", "--config", "configs/adapt.yaml", *words)
    assert code == 1
    assert "contains adapters of another base" in text
    assert f"). Use the configuration of that run: {saved}\n" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "20 of 20 steps, 1 of 1 epochs. To continue, raise --trainer.max_steps and --trainer.max_epochs."),
        (("--trainer.max_epochs", "2"), "train: 20 of 20 steps. To continue, raise --trainer.max_steps."),
        (("--trainer.max_steps", "21"), "train: 1 of 1 epochs. To continue, raise --trainer.max_epochs."),
        (("--trainer.max_steps", "21", "--trainer.max_epochs", "2"), ""),
    ],
)
def test_a_resumed_run_with_nothing_left_to_train_says_so(
    run: Run, a_base_with_adapters: Path, words: tuple[str, ...], message: str
) -> None:
    config = ("--config", "logs/adapt/version_0/config.yaml", "--ckpt_path", "last")
    code, text = run("fit", *config, *words)
    assert code == 0, text
    assert text.count("Nothing is left to train") == (1 if message else 0)
    assert message in text


def photographs(folder: Path, *names: str) -> None:
    for level, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            pixels = np.full((40, 50, 3), 60 + 100 * level + number, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")


@pytest.mark.slow
def test_images_of_one_s_own_need_their_folder_alone(run: Run) -> None:
    photographs(Path("photos"), "cats", "dogs")
    # Random weights, since there is no network; null on the command line is the word None where jsonargparse nests it.
    small = ("--model.backbone.weights", "null", "--data.num_workers", "0", "--trainer.log_every_n_steps", "1")
    words = ("--config", "configs/images.yaml", "--data.root", "photos", *small)
    code, text = run("fit", *words, "--trainer.max_epochs", "1")
    assert code == 0, text
    assert "one output for each of 2 classes" in text
    code, text = run("test", *words, "--ckpt_path", "logs/images")
    assert code == 0, text
    assert "│ cats " in text
    assert "│ dogs " in text
    code, text = run("predict", *words, "--ckpt_path", "logs/images", "--data.predict", "photos/cats/*.jpg")
    assert code == 0, text
    (predictions,) = Path("logs/images").rglob("predictions.csv")
    assert len(predictions.read_text().splitlines()) == 7


def test_a_head_that_is_configured_stays(run: Run) -> None:
    photographs(Path("photos"), "cats", "dogs")
    words = ("--config", "configs/images.yaml", "--data.root", "photos", "--model.backbone.weights", "null")
    code, text = run("fit", *words, "--model.num_classes", "3", "--model.backbone.num_classes", "3")
    assert code == 1
    assert "photos has images of 2 classes (cats, dogs, ...), but the model has num_classes=3" in text


@pytest.mark.filterwarnings("ignore:You are using a CUDA device")
def test_adapters_given_to_lightning_s_own_loading_are_told_with_what_to_call(pretrained: Run) -> None:
    code, text = pretrained("fit", "--config", "configs/adapt.yaml", *SMALL)
    assert code == 0, text
    (checkpoint,) = Path("logs/adapt").rglob("*.ckpt")
    with pytest.raises(
        ValueError, match=r"contains the adapters of backbone.linear1, .*linear3, but not the network"
    ) as error:
        Classifier.load_from_checkpoint(checkpoint, backbone=RichBoyNet())
    assert all(word in str(error.value) for word in ("logs/pretrain", "load_adapter", "lora-lightning merge"))


def test_files_have_the_modes_that_the_umask_says(pretrained: Run) -> None:
    code, text = pretrained("fit", "--config", "configs/adapt.yaml", *SMALL)
    assert code == 0, text
    Path("plain").write_text("")
    mode = Path("plain").stat().st_mode
    files = [path for path in Path("logs").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert {path.name: oct(path.stat().st_mode) for path in files if path.stat().st_mode != mode} == {}


SCRIPT = """
import torch, warnings
warnings.filterwarnings("error", message=".*sync_dist.*")
from lightning.pytorch import Trainer
from lora_lightning import Classifier, MNISTDataModule, RichBoyNet
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, limit_train_batches=2, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    limit_val_batches=3,
)
model = Classifier(RichBoyNet())
trainer.fit(model, MNISTDataModule(source="sample", val_fraction=0.1))
print(f"accuracy {trainer.callback_metrics['val/accuracy']:.4f}", flush=True)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_our_classifier_logs_on_two_devices_without_a_warning(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    output = processes.run("script.py", folder=tmp_path, devices=2)
    values = [line for line in output.splitlines() if line.startswith("accuracy")]
    assert len(values) == 2
    assert len(set(values)) == 1


def test_the_adapter_folder_holds_the_best_checkpoint_where_a_metric_is_monitored(tmp_path: Path) -> None:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lora_lightning import MNISTDataModule, load_adapter
    from lora_lightning.lora import adapter_state_dict

    files = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/loss", mode="max")
    callback = LoRAFinetuning(rank=1)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        limit_train_batches=4,
        limit_val_batches=2,
        logger=False,
        callbacks=[files, callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    torch.manual_seed(0)
    model = Classifier(RichBoyNet())
    base = RichBoyNet()
    base.load_state_dict(model.backbone.state_dict())
    trainer.fit(model, MNISTDataModule(source="sample", val_fraction=0.1, batch_size=100))
    load_adapter(base, callback.adapter_folder)
    best = torch.load(files.best_model_path, weights_only=True)["state_dict"]
    # The loss falls, and the largest is the first: the best by this metric is not the last.
    assert "epoch=0" in files.best_model_path
    for key, value in adapter_state_dict(base).items():
        assert torch.equal(value, best[f"backbone.{key}"])
    for key, value in adapter_state_dict(model).items():
        assert not torch.equal(value, best[key]), "the model stays as it was trained"
