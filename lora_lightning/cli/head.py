"""Sets the size of the head of a model from the classes in the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info

from lora_lightning.data import ImageFolderDataModule
from lora_lightning.data.text_files import read_texts

_BACKBONES = (".image_backbone", ".text_backbone")


def size_head(settings: Namespace) -> None:
    """Set `num_classes` of a model and of its backbone to the number of classes in the data, unless it is configured.

    These are the class folders of an `ImageFolderDataModule`, or the labels in the training file of a `TextDataModule`.
    """
    model, data = settings.get("model"), settings.get("data")
    arguments = _arguments(model)
    backbone = arguments.get("backbone")
    if "num_classes" not in arguments or arguments.num_classes is not None:
        return
    of_backbone = _arguments(backbone)
    if not str(getattr(backbone, "class_path", "")).endswith(_BACKBONES) or of_backbone.get("num_classes") is not None:
        return
    if (classes := _number_of_classes(data)) is not None:
        rank_zero_info(f"The model has one output for each of {classes:,} classes of the data.")
        arguments.num_classes = of_backbone.num_classes = classes


def _number_of_classes(data: Any) -> int | None:
    path, arguments = str(getattr(data, "class_path", "")), _arguments(data)
    if arguments.get("classes") is not None:
        return None
    if path.endswith(".ImageFolderDataModule"):
        return len(ImageFolderDataModule.classes_in(arguments.root))
    if path.endswith(".TextDataModule"):
        return len(set(read_texts(Path(arguments.train), arguments.text_column, arguments.label_column)[1]))
    return None


def _arguments(configured: Any) -> Namespace:
    found = configured.get("init_args") if isinstance(configured, Namespace) else None
    return found if isinstance(found, Namespace) else Namespace()  # type: ignore[no-untyped-call]
