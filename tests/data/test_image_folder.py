"""Folders of images, one a class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2

from lora_lightning import Classifier, ConfusionReport, ImageFolderDataModule, image_backbone
from lora_lightning.backbone_facts import BackboneFacts, set_backbone_facts
from lora_lightning.checkpoints import RandomState
from tests.helpers import same

MakeTrainer = Callable[..., Trainer]
Draw = Callable[..., Path]
CROP = v2.RandomResizedCrop(8, scale=(0.1, 1.0))
TO_TENSOR = v2.Compose([v2.Resize(8), v2.CenterCrop(8), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    """Draws images of one grey each, lighter from one to the next, a folder a class."""

    def make(root: str = "root", **classes: int) -> Path:
        for place, (name, count) in enumerate(classes.items()):
            folder = tmp_path / root / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("L", (12, 10), 40 * place + number).save(folder / f"{number:03}.png")
        return tmp_path / root

    return make


def small(root: Path, **arguments: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(root, **({"preprocessing": TO_TENSOR, "num_workers": 0} | arguments))


def greys(images: Tensor) -> list[int]:
    """Which images these are."""
    return [round(255 * float(image[0, 0, 0])) for image in images]


def noisy(root: Path) -> Path:
    """The same images, of noise."""
    for path in root.rglob("*.png"):
        Image.fromarray(torch.randint(256, (40, 40, 3), dtype=torch.uint8).numpy()).save(path)
    return root


def read(loader: Any) -> tuple[list[int], list[int]]:
    batches = list(loader)
    return [grey for images, _ in batches for grey in greys(images)], [int(t) for _, ts in batches for t in ts]


def test_folders_are_classes_in_alphabetical_order(draw: Draw) -> None:
    data = small(draw(dog=2, cat=3))
    data.setup("fit")
    assert data.class_names == ("cat", "dog")
    assert read(data.test_dataloader()) == ([40, 41, 42, 0, 1], [0, 0, 0, 1, 1])


def test_a_batch_is_of_float_images_and_class_indices(draw: Draw) -> None:
    data = ImageFolderDataModule(draw(cat=3, dog=2), batch_size=4)
    data.setup("fit")
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 224, 224)
    assert images.dtype == torch.float32
    assert targets.dtype == torch.int64


def test_the_preprocessing_is_that_of_the_weights(draw: Draw) -> None:
    root = draw(cat=1, dog=1)
    data = small(root, preprocessing="ResNet18_Weights.IMAGENET1K_V1")
    data.setup("test")
    images, _ = next(iter(data.test_dataloader()))
    image = Image.open(root / "cat" / "000.png").convert("RGB")
    assert torch.equal(images[0], ResNet18_Weights.IMAGENET1K_V1.transforms()(image))


def test_the_preprocessing_is_that_of_the_backbone(draw: Draw, make_trainer: MakeTrainer) -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    set_backbone_facts(backbone, BackboneFacts(preprocessing=TO_TENSOR))
    data = ImageFolderDataModule(draw(cat=2, dog=2), num_workers=0)
    make_trainer(max_epochs=1, limit_val_batches=0).fit(Classifier(backbone, num_classes=2), datamodule=data)


def test_one_data_module_serves_two_models_in_turn(draw: Draw, make_trainer: MakeTrainer) -> None:
    data = ImageFolderDataModule(draw(cat=2, dog=2), num_workers=0, in_memory=True)
    for size in (8, 6, 8):
        backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 2))
        preprocessing = v2.Compose([TO_TENSOR, v2.CenterCrop(size)])
        set_backbone_facts(backbone, BackboneFacts(preprocessing=preprocessing))
        make_trainer(max_epochs=1, limit_val_batches=0).fit(Classifier(backbone, num_classes=2), datamodule=data)


class TestClasses:
    def test_of_a_named_list_of_categories(self, draw: Draw) -> None:
        data = small(draw(goldfish=1, great_white_shark=1), classes="VGG19_Weights.IMAGENET1K_V1")
        data.setup("fit")
        assert read(data.test_dataloader())[1] == [1, 2]
        assert len(data.class_names) == 1000

    def test_of_a_list(self, draw: Draw) -> None:
        data = small(draw(cat=1), classes=["dog", "cat", "eel"])
        data.setup("fit")
        assert read(data.test_dataloader())[1] == [1]

    def test_an_unknown_folder_is_refused_with_close_matches(self, draw: Draw) -> None:
        data = small(draw(Goldfich=1, shark=1, goldfish=1), classes="VGG19_Weights.IMAGENET1K_V1")
        with pytest.raises(
            ValueError,
            match=r"root has 2 folders that match no class: 'Goldfich' \(close: .*goldfish.*\); "
            r"'shark' \(close: great white shark, tiger shark",
        ) as e:
            data.setup("fit")
        assert "Expected names of the 1,000 classes (tench, goldfish, great white shark, ...)." in str(e.value)

    def test_one_folder_alone_is_no_classification(self, draw: Draw) -> None:
        with pytest.raises(ValueError, match=r"root has only the class folder 'cat'"):
            small(draw(cat=1)).setup("fit")

    @pytest.mark.parametrize("classes", ["VGG19_Weights.IMAGENET", "vgg", "FasterRCNN_Nothing.COCO"])
    def test_unknown_weights_are_refused(self, draw: Draw, classes: str) -> None:
        with pytest.raises(ValueError, match=rf"classes='{classes}': expected a list of names, or the name of"):
            small(draw(cat=1), classes=classes)

    @pytest.mark.parametrize(("classes", "what"), [(["cat", "cat"], "repeats cat"), (["cat"], "has 1 names")])
    def test_names_come_once_and_are_two_or_more(self, draw: Draw, classes: list[str], what: str) -> None:
        with pytest.raises(ValueError, match=f"classes {what}; expected two or more, each once"):
            small(draw(cat=1), classes=classes)

    def test_have_to_be_as_many_as_the_models(self, draw: Draw, make_trainer: MakeTrainer) -> None:
        model = Classifier(nn.Linear(3, 10), num_classes=10)
        with pytest.raises(
            ValueError, match=r"images of 2 classes \(cat, dog, ...\), but the model has num_classes=10"
        ):
            make_trainer().fit(model, datamodule=small(draw(cat=1, dog=1)))


class TestParts:
    def test_of_separate_folders(self, draw: Draw) -> None:
        for part, images in {"train": {"cat": 3, "dog": 2}, "val": {"dog": 1}, "test": {"cat": 1}}.items():
            root = draw(f"root/{part}", **images).parent
        data = small(root)
        data.setup("fit")
        assert sorted(read(data.train_dataloader())[1]) == [0, 0, 0, 1, 1]
        assert read(data.val_dataloader())[1] == [1]
        assert read(data.test_dataloader())[1] == [0]

    def test_a_class_that_was_not_trained_on_is_refused(self, draw: Draw) -> None:
        draw("root/train", cat=1, dog=1)
        root = draw("root/test", dig=1).parent
        with pytest.raises(ValueError, match=r"test has 1 folder that matches no class: 'dig' \(close: dog\)"):
            small(root).setup("fit")

    def test_without_training_folders_are_refused(self, draw: Draw) -> None:
        root = draw("root/val", cat=1, dog=1).parent
        with pytest.raises(ValueError, match=r"root has class folders in val/, but none in train/"):
            small(root).setup("fit")

    def test_split_off_keep_the_share_of_every_class_and_share_no_image(self, draw: Draw) -> None:
        data = small(draw(cat=20, dog=10), val_fraction=0.2, test_fraction=0.1)
        data.setup("fit")
        train, val, test = (
            read(loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
        )
        assert [targets.count(0) for _, targets in (train, val, test)] == [14, 4, 2]
        assert [targets.count(1) for _, targets in (train, val, test)] == [7, 2, 1]
        assert sorted(train[0] + val[0] + test[0]) == [*range(20), *range(40, 50)]

    def test_split_off_depend_on_the_split_seed_alone(self, draw: Draw) -> None:
        root, held_out = draw(cat=20, dog=10), []
        for split_seed in (0, 0, 1):
            torch.manual_seed(len(held_out))
            data = small(root, val_fraction=0.2, split_seed=split_seed)
            data.setup("fit")
            held_out.append(read(data.val_dataloader())[0])
        assert held_out[0] == held_out[1] != held_out[2]

    def test_that_are_the_same_images_say_so(self, draw: Draw, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level("INFO"):
            small(draw(cat=2, dog=2)).setup("test")
        assert (
            "4 for training, from 2 of 2 classes, 0 for validation, "
            "4 for testing (the training images: there are no others)." in caplog.text
        )

    def test_where_only_validation_images_are_held_out_those_are_tested(
        self, draw: Draw, caplog: pytest.LogCaptureFixture
    ) -> None:
        draw("root/train", cat=2, dog=2)
        data = small(draw("root/val", cat=1, dog=2).parent)
        with caplog.at_level("INFO"):
            data.setup("test")
        assert "3 for validation, 3 for testing (the validation images)." in caplog.text
        assert read(data.test_dataloader()) == read(data.val_dataloader())

    def test_nothing_to_validate_on_is_refused(self, draw: Draw, make_trainer: MakeTrainer) -> None:
        with pytest.raises(ValueError, match=r"root has no folder val, and val_fraction=0.0 leaves no images"):
            make_trainer().validate(Classifier(nn.Flatten(), num_classes=2), datamodule=small(draw(cat=1, dog=1)))


class TestBadFolders:
    def test_damaged_images_are_all_named(self, draw: Draw) -> None:
        root = draw(cat=2, dog=2)
        (root / "cat" / "empty.jpg").touch()
        (root / "dog" / "notes.webp").write_text("fish food")
        with pytest.raises(ValueError, match=r"empty.jpg is damaged.* .*notes.webp is damaged"):
            small(root).setup("fit")

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_a_image_that_ends_too_early_is_named_when_it_is_read(self, draw: Draw, num_workers: int) -> None:
        root = draw(cat=2, dog=2)
        path = root / "cat" / "001.png"
        path.write_bytes(path.read_bytes()[:50])
        data = small(root, num_workers=num_workers)
        data.setup("fit")
        with pytest.raises(ValueError, match=r"001.png is damaged, or not a"):
            list(data.test_dataloader())

    def test_a_class_without_images_is_refused(self, draw: Draw) -> None:
        with pytest.raises(ValueError, match=r"dog contains no images \(.jpg, .jpeg, .png, .webp, .bmp\)"):
            small(draw(cat=1, dog=0)).setup("fit")

    def test_other_files_are_passed_over_and_named(self, draw: Draw, caplog: pytest.LogCaptureFixture) -> None:
        root = draw(cat=1, dog=1)
        (root / "cat" / "notes.txt").touch()
        with caplog.at_level("INFO"):
            small(root).setup("fit")
        assert (
            f"Ignored, since they are not images (.jpg, .jpeg, .png, .webp, .bmp) of a class: {root}/cat/notes.txt."
            in caplog.text
        )

    def test_images_without_class_folders_are_refused(self, draw: Draw) -> None:
        root = draw(cat=3) / "cat"
        with pytest.raises(
            ValueError, match=r"cat contains 3 images, but no folders; expected a folder of images per class"
        ):
            small(root).setup("fit")

    def test_a_missing_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"nowhere is not a folder; expected one with a folder of images per class"
        ):
            small(tmp_path / "nowhere").setup("fit")

    def test_images_of_different_sizes_are_named(self, draw: Draw) -> None:
        root = draw(cat=1, dog=1)
        Image.new("L", (30, 30)).save(root / "dog" / "large.png")
        data = small(root, preprocessing=v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32)]))
        data.setup("test")
        with pytest.raises(
            ValueError, match=r"000.png and .*large.png have different shapes \(\(3, 10, 12\), \(3, 30, 30\)\)"
        ):
            list(data.test_dataloader())

    def test_a_preprocessing_without_a_tensor_is_named(self, draw: Draw) -> None:
        data = small(draw(cat=1, dog=1), preprocessing=v2.Resize(8))
        data.setup("test")
        with pytest.raises(ValueError, match=r"The preprocessing returned a Image for .*000.png; expected a tensor"):
            list(data.test_dataloader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"num_workers": -1}, "num_workers=-1: expected at least 0"),
        ({"val_fraction": 1.0}, "val_fraction=1.0: expected a share of at least 0 and below 1"),
        (
            {"val_fraction": 0.5, "test_fraction": 0.5},
            "val_fraction=0.5 and test_fraction=0.5 leave nothing to train on",
        ),
        ({"preprocessing": "VGG"}, "preprocessing='VGG': expected a transform, or the name of torchvision's weights"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageFolderDataModule("root", **arguments)


class TestAugmentation:
    """What training images become is a function of seed, epoch and image."""

    def test_differs_between_epochs_and_not_between_workers(self, draw: Draw) -> None:
        root = noisy(draw(cat=4, dog=4))
        seen = []
        for num_workers, in_memory, epoch in ((0, False, 0), (2, False, 0), (0, True, 0), (0, False, 1), (2, False, 1)):
            data = small(root, augmentation=CROP, num_workers=num_workers, in_memory=in_memory, batch_size=8)
            data.setup("fit")
            loader = data.train_dataloader()
            loader.sampler.set_epoch(epoch)
            torch.manual_seed(len(seen))
            seen.append({image.numpy().tobytes() for images, _ in loader for image in images})
        assert len(seen[0]) == 8
        assert seen[0] == seen[1] == seen[2]
        assert seen[3] == seen[4]
        assert not seen[0] & seen[3]

    def test_is_not_applied_to_what_is_tested(self, draw: Draw) -> None:
        data = small(draw(cat=3, dog=2), augmentation=v2.RandomInvert(1.0))
        data.setup("fit")
        assert read(data.test_dataloader())[0] == [0, 1, 2, 40, 41]
        assert sorted(read(data.train_dataloader())[0]) == [214, 215, 253, 254, 255]


def test_a_resumed_run_sees_the_images_that_it_would_have_seen(
    draw: Draw, make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    root = noisy(draw(cat=5, dog=6))

    def run(name: str, ckpt_path: Path | None = None) -> Any:
        torch.manual_seed(0)
        model = Classifier(nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(192, 2)), num_classes=2)
        files = ModelCheckpoint(tmp_path / name, filename="{step}", save_top_k=-1, every_n_train_steps=4)
        trainer = make_trainer(RandomState(), files, max_epochs=3, limit_val_batches=0)
        trainer.fit(model, datamodule=small(root, augmentation=CROP, batch_size=2), ckpt_path=ckpt_path)
        return model.state_dict()

    expected = run("whole")
    assert same(run("resumed", tmp_path / "whole" / "step=8.ckpt"), expected)


def test_in_memory_every_image_is_decoded_once(draw: Draw) -> None:
    root = draw(cat=3, dog=2)
    data = small(root, in_memory=True)
    data.setup("fit")
    first = sorted(read(data.train_dataloader())[0])
    for path in root.rglob("*.png"):
        path.unlink()
    assert sorted(read(data.train_dataloader())[0]) == first == [0, 1, 2, 40, 41]


class TestPredict:
    def test_a_file_a_folder_a_pattern_or_all(
        self, draw: Draw, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        root = draw(cat=2, dog=2)
        monkeypatch.chdir(tmp_path)
        for predict, expected in {
            None: [0, 1, 40, 41],
            "root": [0, 1, 40, 41],
            "root/dog/001.png": [41],
            "root/*/000.*": [0, 40],
            str(root / "**" / "*1.png"): [1, 41],
        }.items():
            data = small(root, predict=predict)
            data.setup("predict")
            assert [grey for images in data.predict_dataloader() for grey in greys(images)] == expected
            assert len(data.predict_files) == len(expected)

    def test_what_matches_no_image_is_refused(self, draw: Draw) -> None:
        data = small(draw(cat=1, dog=1), predict="*.tiff")
        with pytest.raises(
            FileNotFoundError, match=r"\*.tiff is not an image and matches none; expected an image \(.jpg"
        ):
            data.setup("predict")

    def test_a_file_that_is_no_image_is_refused(self, draw: Draw, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("fish food")
        with pytest.raises(ValueError, match=r"notes.txt is damaged, or not a"):
            small(draw(cat=1, dog=1), predict=tmp_path / "notes.txt").setup("predict")


def test_a_device_without_images_gets_a_batch_of_none(draw: Draw) -> None:
    data = small(draw(cat=1, dog=1))
    data.setup("test")
    images, targets = data.test_dataloader().dataset.__getitems__([])
    assert images.shape == (0, 3, 8, 8)
    assert targets.shape == (0,)


def test_the_report_of_three_folders_has_their_names(
    draw: Draw, make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    report = ConfusionReport()
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), num_classes=3)
    make_trainer(report).test(model, datamodule=small(draw(cat=4, dog=3, eel=2)))
    assert report.report.adapted.class_names == ("cat", "dog", "eel")
    assert report.report.adapted.support == [4, 3, 2]
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("cat", "dog", "eel"))


def test_the_images_that_come_with_the_package_are_five_goldfish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ImageFolderDataModule("sample", classes="VGG19_Weights.IMAGENET1K_V1", num_workers=0)
    data.setup("fit")
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (5, 3, 224, 224)
    assert targets.tolist() == [1] * 5
    assert image_backbone("resnet18").backbone_facts.preprocessing.crop_size == [224]


def test_a_folder_called_sample_comes_before_those(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw("sample", cat=1, dog=1)
    monkeypatch.chdir(tmp_path)
    data = small(Path("sample"))
    data.setup("fit")
    assert data.class_names == ("cat", "dog")


@pytest.mark.parametrize("focus", ["dog", ["dog"]])
def test_the_focus_has_its_share_of_each_batch(draw: Draw, focus: str | list[str]) -> None:
    data = small(draw(cat=30, dog=5, eel=30), focus=focus, focus_fraction=0.5, batch_size=8)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 15
    assert all(int((targets == 1).sum()) == 4 for _, targets in batches)
    others = [
        grey for images, targets in batches for grey, target in zip(greys(images), targets, strict=True) if target != 1
    ]
    assert sorted(others) == [*range(30), *range(80, 110)]


@pytest.mark.parametrize(
    ("focus", "message"),
    [
        (["dgo"], r"focus=\['dgo'\]: 'dgo' is not one of the classes \(cat, dog\)"),
        (["cat", "dog"], "expected at least one class, and at least one other class to mix in"),
        ([], "expected at least one class"),
    ],
)
def test_a_focus_that_can_not_be_is_refused_by_name(draw: Draw, focus: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(draw(cat=3, dog=3), focus=focus).setup("fit")
