"""Defines `ImageFolderDataModule`, for images in one folder per class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.models import get_weight
from torchvision.transforms._presets import ImageClassification
from typing_extensions import override

from lora_lightning.backbone_facts import backbone_facts
from lora_lightning.checkpoints import ResumableLoader
from lora_lightning.data.categories import categories_of
from lora_lightning.data.focus import as_list, check_classes, check_share, replay_sampler
from lora_lightning.data.folders import (
    SPLITS,
    Labelled,
    class_folders,
    images_to_predict,
    labelled_images,
    split_folders,
)
from lora_lightning.data.image_dataset import ImageDataset, Transform
from lora_lightning.data.in_memory import full_batches, stratified_split
from lora_lightning.data.module import ResumableDataModule
from lora_lightning.data.samplers import ShuffledSampler

SAMPLE = Path(__file__).parent / "sample" / "images"
_IMAGENET: Transform = ImageClassification(crop_size=224)
_TESTED_INSTEAD = {"": "", "val": " (the validation images)", "train": " (the training images: there are no others)"}
"""Descriptions of the test images by the split that replaces a missing one."""


class ImageFolderDataModule(ResumableDataModule):
    """Loads images from one folder per class, preprocessed for a backbone: (B, 3, H, W), float32.

    The images are `root/<class name>/*.{jpg,jpeg,png,webp,bmp}`.

    If `root` contains `train/`, and possibly `val/` and `test/`, with class folders, these splits are used. Missing
    splits are taken from the training images. Images can be greyscale, have a palette, transparency (on white), 16 bits
    or an orientation in their EXIF data. Damaged, empty or oversized images are refused by name.

    Args:
        root: The folder, or `sample` for the images in the package if there is no folder with this name.
        classes: The names of all classes in the order of their indices, or the name of torchvision's weights that were
            trained on them (`VGG19_Weights.IMAGENET1K_V1`: a folder `goldfish` is class 1 of ImageNet's 1,000). By
            default the sorted names of the training folders. Underscores in the name of a folder can replace spaces.
        preprocessing: A transform from an image to a tensor, or the name of torchvision's weights
            (`VGG19_Weights.IMAGENET1K_V1`). The default is that of the backbone if `image_backbone` created it, or else
            the usual one for ImageNet (256 pixels on the shorter side, the central 224 x 224, normalized).
        augmentation: A transform of torchvision.transforms.v2 for training images, applied before the preprocessing.
        predict: Images to predict: a file, a folder with its subfolders, or a glob pattern. By default all images in
            `root`.
        focus: Classes to over-represent, for example one with low recall.
        focus_fraction: Share of these classes in each training batch. The rest is drawn from all others (replay).
        batch_size: Batch size in training, per device.
        eval_batch_size: Batch size in validation, test and prediction, per device.
        val_fraction: Fraction of the training images that is held out for validation, equal for every class.
        test_fraction: The same for testing. If it is 0 and there is no folder `test`, the test uses the validation
            images, or else the training images, with a warning.
        split_seed: Seed of the split, which is independent of the seed of the run.
        num_workers: Number of processes that decode images.
        in_memory: Whether to decode every image once in the main process and keep it: 0.6 MB each at 224 x 224.

    Attributes:
        class_names: The names of all classes, after `setup`.
        predict_files: The images to predict, after `setup`.

    Raises:
        ValueError: If a value is out of range. In `setup`, if a folder does not match any class or is empty, or if a
            file is not an image.
        FileNotFoundError: In `setup`, if a folder or image does not exist.

    Example::

        data = ImageFolderDataModule("images", classes="VGG19_Weights.IMAGENET1K_V1", batch_size=5)
        trainer.fit(Classifier(image_backbone("vgg19", "IMAGENET1K_V1"), num_classes=1000), datamodule=data)
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        classes: str | list[str] | None = None,
        preprocessing: str | nn.Module | None = None,
        augmentation: nn.Module | None = None,
        predict: str | os.PathLike[str] | None = None,
        focus: str | list[str] | None = None,
        focus_fraction: float = 0.2,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        val_fraction: float = 0.0,
        test_fraction: float = 0.0,
        split_seed: int = 0,
        num_workers: int = 2,
        in_memory: bool = False,
    ) -> None:
        super().__init__(batch_size, eval_batch_size)
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers!r}: expected at least 0.")
        for name, fraction in {"val_fraction": val_fraction, "test_fraction": test_fraction}.items():
            if not 0 <= fraction < 1:
                raise ValueError(f"{name}={fraction!r}: expected a share of at least 0 and below 1.")
        if val_fraction + test_fraction >= 1:
            raise ValueError(
                f"val_fraction={val_fraction} and test_fraction={test_fraction} leave nothing to train on."
            )
        check_share(focus_fraction)
        self.focus, self.focus_fraction = as_list(focus), focus_fraction
        self.root = _folder(root)
        self.preprocessing = _preset(preprocessing) if isinstance(preprocessing, str) else preprocessing
        self.augmentation = augmentation
        self.predict = predict
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.split_seed = split_seed
        self.num_workers = num_workers
        self.in_memory = in_memory
        self.class_names = None if classes is None else categories_of(classes)
        self.predict_files: list[Path] = []
        self._datasets: dict[str, ImageDataset] = {}

    @staticmethod
    def classes_in(root: str | os.PathLike[str]) -> tuple[str, ...]:
        """Return the sorted names of the class folders of the training split.

        Raises:
            ValueError: If there are fewer than two.
            FileNotFoundError: If the folder does not exist.
        """
        folder = split_folders(_folder(root))["train"]
        names = [class_folder.name for class_folder in class_folders(folder)]
        if len(names) < 2:
            raise ValueError(
                f"{folder} has only the class folder {names[0]!r}; a classifier needs two or more classes. List all of "
                "them in classes, for example VGG19_Weights.IMAGENET1K_V1."
            )
        return tuple(names)

    def preprocessing_in_words(self) -> str:
        """Return a description of the preprocessing: its transform."""
        return " ".join(str(self._preprocessing()).split())

    @override
    def setup(self, stage: str) -> None:
        if stage == "predict":
            self._set_up_prediction()
        elif not self._datasets:
            self._set_up_parts()
        for dataset in self._datasets.values():  # which may have been set up for another model
            dataset.preprocess_by(self._preprocessing())
        self._compare_with_model()

    @override
    def make_train_loader(self) -> ResumableLoader:
        dataset = self._dataset("train")
        sampler: DistributedSampler[int] = ShuffledSampler(len(dataset), **self.placement())
        if self.focus is not None:
            assert self.class_names is not None
            classes = [self.class_names.index(name) for name in self.focus]
            assert dataset.targets is not None
            sampler = replay_sampler(dataset.targets, classes, self.batch_size, self.focus_fraction, self.placement())
        return ResumableLoader(dataset, sampler=sampler, batch_size=self.batch_size, **self._loading())

    @override
    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        dataset = self._dataset("val")
        if len(dataset):
            return self.eval_loader(dataset, **self._loading())
        if self.trainer is not None and self.trainer.state.fn == "validate":
            raise ValueError(
                f"{self.root} has no folder val, and val_fraction={self.val_fraction} leaves no images for validation."
            )
        return []

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self.eval_loader(self._dataset("test"), **self._loading())

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        dataset = ImageDataset(self.predict_files, None, self._preprocessing())
        return self.eval_loader(dataset, **self._loading())

    def _set_up_parts(self) -> None:
        folders = split_folders(self.root)
        if self.class_names is None:
            self.class_names = self.classes_in(self.root)
        check_classes(self.focus, self.class_names)
        labelled = {split: labelled_images(folder, self.class_names) for split, folder in folders.items()}
        of_all = len(labelled["train"][0])
        for split, fraction in {"test": self.test_fraction, "val": self.val_fraction}.items():
            if split not in folders:
                labelled["train"], labelled[split] = self._split_off(labelled["train"], round(fraction * of_all))
        instead = "" if labelled["test"][0] else "val" if labelled["val"][0] else "train"
        if instead:
            labelled["test"] = labelled[instead]
        for split, (files, targets) in labelled.items():
            augmentation = self.augmentation if split == "train" else None
            self._datasets[split] = ImageDataset(files, targets, self._preprocessing(), augmentation, self.in_memory)
        train, val, test = (labelled[split][0] for split in SPLITS)
        rank_zero_info(
            f"Images in {self.root}: {len(train):,} for training, from {len(set(labelled['train'][1])):,} of "
            f"{len(self.class_names):,} classes, {len(val):,} for validation, {len(test):,} for testing"
            f"{_TESTED_INSTEAD[instead]}."
        )

    def _split_off(self, labelled: Labelled, held_out: int) -> tuple[Labelled, Labelled]:
        files, targets = labelled
        kept_rows, held_out_rows = stratified_split(torch.tensor(targets), held_out, self.split_seed)
        kept, held = (
            ([files[row] for row in rows], [targets[row] for row in rows]) for rows in (kept_rows, held_out_rows)
        )
        return kept, held

    def _set_up_prediction(self) -> None:
        if self.class_names is None:
            self.class_names = tuple(folder.name for folder in class_folders(split_folders(self.root)["train"]))
        self.predict_files = images_to_predict(self.root if self.predict is None else Path(self.predict))

    def _compare_with_model(self) -> None:
        assert self.class_names is not None
        expected = None if self.trainer is None else getattr(self.trainer.lightning_module, "num_classes", None)
        if expected not in (None, len(self.class_names)):
            raise ValueError(
                f"{self.root} has images of {len(self.class_names):,} classes ({', '.join(self.class_names[:3])}, "
                f"...), but the model has num_classes={expected}. Set it and that of the backbone to "
                f"{len(self.class_names)}, or list the classes of the model in the classes of the data module."
            )

    def _dataset(self, split: str) -> ImageDataset:
        if split not in self._datasets:
            raise RuntimeError("ImageFolderDataModule is not set up: call setup('fit') first, as Trainer does.")
        return self._datasets[split]

    def _preprocessing(self) -> Transform:
        if self.preprocessing is not None:
            return self.preprocessing
        modules = [] if self.trainer is None else self.trainer.lightning_module.modules()
        for module in modules:
            facts = backbone_facts(module)
            if facts is not None and facts.preprocessing is not None:
                return facts.preprocessing
        return _IMAGENET

    def _loading(self) -> dict[str, Any]:
        """Return the arguments of a data loader. Images in memory need no workers, which would each hold a copy."""
        return {**full_batches(), "num_workers": 0 if self.in_memory else self.num_workers}


def _folder(root: str | os.PathLike[str]) -> Path:
    return SAMPLE if str(root) == "sample" and not Path(root).exists() else Path(root)


def _preset(name: str) -> nn.Module:
    try:
        transforms: nn.Module = get_weight(name).transforms()
    except (ValueError, KeyError, AttributeError):
        raise ValueError(
            f"preprocessing={name!r}: expected a transform, or the name of torchvision's weights, for example "
            "VGG19_Weights.IMAGENET1K_V1."
        ) from None
    return transforms
