"""VGG-19 and five goldfish: the configurations that come with the project, as a user runs them."""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_lightning import image_backbone
from lora_lightning.data.image_folder import SAMPLE
from lora_lightning.data.images import read_image
from tests import processes
from tests.conftest import ROOT, copy_logs, logs_of

Run = Callable[..., tuple[int, str]]
PICTURES = sorted(path.name for path in (SAMPLE / "goldfish").iterdir())


def predictions(folder: str) -> list[dict[str, str]]:
    """Of the newest run in a log folder."""
    newest = max(Path(folder).rglob("predictions*.csv"), key=lambda path: path.stat().st_mtime_ns)
    with newest.open() as file:
        return list(csv.DictReader(file))


def check_that_every_image_is_a_goldfish(folder: str) -> None:
    rows = predictions(folder)
    assert [Path(row["file"]).name for row in rows] == PICTURES
    assert {(row["class"], row["category"]) for row in rows} == {("1", "goldfish")}


def fit_and_predict(run: Run, *config: str) -> Path:
    """Both commands, and what holds after them whatever the network; the adapter folder."""
    code, text = run("fit", *config)
    assert code == 0, text
    assert "The base is bitwise unchanged" in text
    [adapter] = Path("logs/goldfish_lora").glob("version_*/adapter")
    assert sum(path.stat().st_size for path in adapter.iterdir()) <= 6_000_000
    code, text = run("predict", *config)
    assert code == 0, text
    assert all(f"{name}  " in text for name in PICTURES)
    check_that_every_image_is_a_goldfish("logs/goldfish_lora")
    return adapter


NETWORKS = ["timm/test_resnet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("squeezenet1_1", "vgg19"))]
"""That of the configurations has 143 million parameters; the first takes no time."""


@pytest.mark.parametrize("name", NETWORKS)
def test_adapters_in_all_layers(run: Run, name: str) -> None:
    config = ("--config", "configs/goldfish_lora.yaml", "--model.backbone.name", name)
    adapter = fit_and_predict(run, *config)
    adapted = predictions("logs/goldfish_lora")

    code, text = run("predict", *config, "--adapter", str(adapter))
    assert code == 0, text
    assert predictions("logs/goldfish_lora") == adapted

    code, text = run("predict", *config, "--adapter", "none")
    assert code == 0, text
    assert "only the base is used" in text
    torch.manual_seed(0)
    net = image_backbone(name).eval()
    preprocess = net.backbone_facts.preprocessing
    images = torch.stack([preprocess(read_image(SAMPLE / "goldfish" / picture)) for picture in PICTURES])
    with torch.no_grad():
        of_base = net(images).softmax(1)
    for row, expected in zip(predictions("logs/goldfish_lora"), of_base, strict=True):
        assert int(row["class"]) == int(expected.argmax())
        assert float(row["probability"]) == pytest.approx(float(expected.max()), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["squeezenet1_1", "vgg19"])
def test_the_bypass_predicts_the_same_in_a_new_process(run: Run, name: str) -> None:
    config = ("--config", "configs/goldfish.yaml", "--model.backbone.name", name)
    code, text = run("fit", *config)
    assert code == 0, text
    assert f"Trained: {150_528 * 10 + 10 * 1_000:,} parameters, " in text
    assert "The base is bitwise unchanged" in text
    code, text = run("predict", *config)
    assert code == 0, text
    check_that_every_image_is_a_goldfish("logs/goldfish")
    here = predictions("logs/goldfish")
    processes.run("-m", "lora_lightning", "predict", *config, "--adapter", "logs/goldfish", folder=Path())
    assert predictions("logs/goldfish") == here


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "efficientnet_b0",
        "timm/mobilenetv3_small_100",
        # Without weights its last layer is zero, so that no gradient passes it in the only step of the first epoch.
        pytest.param(
            "vit_b_16",
            marks=pytest.mark.filterwarnings("ignore:Training has not changed the adapters of 'conv_proj'"),
        ),
        "convnext_tiny",
    ],
)
def test_any_other_backbone_by_its_name(run: Run, name: str) -> None:
    fit_and_predict(run, "--config", "configs/goldfish_lora.yaml", "--model.backbone.name", name)


SMALL = ("--config", "configs/goldfish_lora.yaml", "--model.backbone.name", "timm/test_resnet")


@pytest.fixture(scope="module")
def fitted_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return logs_of(tmp_path_factory.mktemp("goldfish"), ("fit", *SMALL, "--trainer.max_epochs", "1"))


class TestSmall:
    """The same commands with a network that takes no time."""

    CONFIG = SMALL

    @pytest.fixture
    def fitted(self, workspace: Path, fitted_once: Path) -> Path:
        copy_logs(fitted_once, "goldfish_lora")
        return Path("logs/goldfish_lora")

    def test_the_documented_commands_run_twice(self, run: Run) -> None:
        commands = re.findall(
            r"^lora-lightning (fit|predict) (.*goldfish.*)$", (ROOT / "docs" / "images.md").read_text(), re.MULTILINE
        )
        assert [command for command, _ in commands] == ["fit", "predict", "predict"]
        Path("lora_lightning").symlink_to(ROOT / "lora_lightning")
        for _ in range(2):
            for command, words in commands:
                code, text = run(command, *shlex.split(words), *self.CONFIG[2:], "--trainer.max_epochs", "2")
                assert code == 0, text
        assert [Path(row["file"]).name for row in predictions("logs/goldfish_lora")] == [
            "close.jpg",
            "one.jpg",
            "two.jpg",
        ]

    def test_validate_has_nothing_to_validate_on(self, run: Run) -> None:
        code, text = run("validate", *self.CONFIG)
        assert code == 1
        assert "has no folder val, and val_fraction=0.0 leaves no images for validation." in text

    def test_test_shows_base_and_adapted(self, run: Run, fitted: Path) -> None:
        code, text = run("test", *self.CONFIG, "--ckpt_path", str(fitted))
        assert code == 0, text
        assert "the other 999 classes have no samples" in text
        assert "goldfish" in text

    @pytest.mark.parametrize(
        ("config", "name"), [("goldfish", "squeezenet1_1"), ("goldfish_lora", "timm/test_resnet")]
    )  # the bypass has the shape of the configured images, which the smallest network does not take
    def test_both_configs_stop_after_a_batch(self, run: Run, config: str, name: str) -> None:
        for command in ("fit", "test", "predict"):
            words = "--model.backbone.name", name, "--trainer.fast_dev_run", "true"
            code, text = run(command, "--config", f"configs/{config}.yaml", *words)
            assert code == 0, text

    def test_a_file_a_folder_or_a_pattern_is_predicted(self, run: Run, fitted: Path) -> None:
        for what, expected in {
            SAMPLE / "goldfish" / "two.jpg": ["two.jpg"],
            SAMPLE: PICTURES,
            SAMPLE / "*" / "*.jpg": ["close.jpg", "one.jpg", "two.jpg"],
        }.items():
            code, text = run("predict", *self.CONFIG, "--data.predict", str(what))
            assert code == 0, text
            assert [Path(row["file"]).name for row in predictions(str(fitted))] == expected

    def test_without_any_run_the_base_predicts_and_that_is_said(self, run: Run) -> None:
        code, text = run("predict", *self.CONFIG)
        assert code == 0, text
        assert "No checkpoint in logs/goldfish_lora: the configured model is used." in text

    @pytest.mark.slow
    def test_the_last_training_predicts_whatever_was_predicted_or_tested_since(self, run: Run, fitted: Path) -> None:
        for command, words in {"predict": ("--adapter", "none"), "test": ()}.items():
            code, text = run(command, *self.CONFIG, *words)
            assert code == 0, text
        for command, words in {"predict": (), "fit": ("--ckpt_path", "last")}.items():
            code, text = run(command, *self.CONFIG, *words)
            assert code == 0, text
            assert f"Checkpoint: {fitted}/version_0/checkpoints/" in text

    def test_adapters_of_another_folder_are_taken(self, run: Run, fitted: Path, tmp_path: Path) -> None:
        other = ("--trainer.logger.name", "other", "--seed_everything", "0", "--model.optimizer.lr", "0.1")
        code, text = run("fit", *self.CONFIG, *other)
        assert code == 0, text
        rows = []
        for adapter in ("logs/goldfish_lora", "logs/other", "none"):
            code, text = run("predict", *self.CONFIG, "--adapter", adapter)
            assert code == 0, text
            rows.append(predictions("logs/goldfish_lora"))
        assert rows[0] != rows[1] != rows[2] != rows[0]

    def test_adapters_of_another_base_are_noticed(self, run: Run, fitted: Path) -> None:
        with pytest.warns(
            UserWarning, match=r"was trained on another base: .* Use the configuration, seed and base checkpoint"
        ):
            code, text = run("predict", *self.CONFIG, "--adapter", str(fitted), "--seed_everything", "1")
        assert code == 0, text

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (
                ("--adapter", "logs/nowhere"),
                "logs/nowhere is not an adapter folder and contains none (adapter_config.json)",
            ),
            (("--data.predict", "*.tiff"), "*.tiff is not an image and matches none"),
            (("--model.backbone.name", "vgg20"), "torchvision has no classification network 'vgg20'. Did you mean vgg"),
            (("--model.backbone.weights", "IMAGENET"), "weights='IMAGENET' is not a file."),
            (("--data.root", "nowhere"), "nowhere is not an image and matches none"),
            (
                ("--data.classes", "VGG"),
                "classes='VGG': expected a list of names, or the name of torchvision's weights",
            ),
            (("--model.num_classes", "3"), "the model has num_classes=3. Set it and that of the backbone to 1000"),
        ],
    )
    def test_what_is_wrong_is_said_in_one_line(self, run: Run, words: tuple[str, str], message: str) -> None:
        code, text = run("predict", *self.CONFIG, *words)
        assert code in (1, 2)
        assert message in " ".join(text.split())
        assert "Traceback" not in text

    def test_a_damaged_image_ends_the_run_by_name(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "root" / "goldfish").mkdir(parents=True)
        content = (SAMPLE / "goldfish" / "one.jpg").read_bytes()
        (tmp_path / "root" / "goldfish" / "half.jpg").write_bytes(content[: len(content) // 2])
        words = ("--data.root", "root", "--data.in_memory", "false")
        code, text = run("fit", *self.CONFIG, *words)
        assert code == 1
        line = next(line for line in text.splitlines() if line.startswith("lora-lightning: error:"))
        assert line.startswith(
            "lora-lightning: error: root/goldfish/half.jpg is damaged, or not a JPEG, PNG, WEBP or BMP image"
        )

    def test_a_network_of_torchvision_may_be_named_as_a_class(self, run: Run) -> None:
        text = Path("configs/goldfish_lora.yaml").read_text()
        text = text.replace("lora_lightning.image_backbone", "torchvision.models.squeezenet1_1").replace(
            "{name: vgg19, ", "{"
        )
        Path("direct.yaml").write_text(text)
        code, printed = run("fit", "--config", "direct.yaml", "--trainer.max_epochs", "1")
        assert code == 0, printed
