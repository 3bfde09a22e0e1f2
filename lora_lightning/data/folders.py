"""Finds class folders and the images in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from lora_lightning.data.categories import indices_of
from lora_lightning.data.images import EXTENSIONS, check_image, images_among, images_in

SPLITS = ("train", "val", "test")
Labelled = tuple[list[Path], list[int]]
"""Images and their class indices."""


def split_folders(root: Path) -> dict[str, Path]:
    """Return the folders of the splits. If there are none, the folder itself is the training split.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If there are splits, but no training split.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; expected one with a folder of images per class.")
    splits = {split: root / split for split in SPLITS if _has_folders(root / split)}
    if splits and "train" not in splits:
        raise ValueError(
            f"{root} has class folders in {', '.join(f'{split}/' for split in splits)}, but none in train/; expected "
            "train/<class name>/ as well."
        )
    return splits or {"train": root}


def class_folders(folder: Path) -> list[Path]:
    """Return the subfolders sorted by name, except hidden ones.

    Raises:
        ValueError: If there are none.
    """
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        images, _ = images_in(folder)
        contents = f"{len(images)} images, but no folders" if images else "no folders"
        raise ValueError(
            f"{folder} contains {contents}; expected a folder of images per class: {folder}/<class name>/."
        )
    return found


def labelled_images(folder: Path, class_names: Sequence[str]) -> Labelled:
    """Return the images in the class folders of a folder, with their class indices.

    Raises:
        ValueError: If a folder does not match any class or has no images, or if a file is not an image.
    """
    found = class_folders(folder)
    indices = indices_of([class_folder.name for class_folder in found], class_names, str(folder))
    files: list[Path] = []
    targets: list[int] = []
    ignored: list[Path] = []
    for class_folder, index in zip(found, indices, strict=True):
        images, others = images_in(class_folder)
        if not images:
            raise ValueError(
                f"{class_folder} contains no images ({', '.join(EXTENSIONS)}). Add some, or remove the folder."
            )
        files += images
        targets += [index] * len(images)
        ignored += others
    _report_ignored(ignored)
    _refuse_damaged(files)
    return files, targets


def images_to_predict(path: Path) -> list[Path]:
    """Return the images for a file, for a folder and its subfolders, or for a glob pattern.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If a file is not an image.
    """
    others: list[Path] = []
    if path.is_dir():
        images, others = images_in(path, below=True)
    elif path.is_file():
        images = [path]
    else:
        pattern = str(path.relative_to(path.anchor))
        images, others = images_among(match for match in Path(path.anchor).glob(pattern) if match.is_file())
    if not images:
        raise FileNotFoundError(
            f"{path} is not an image and matches none; expected an image ({', '.join(EXTENSIONS)}), a folder of them, "
            "or a glob pattern in quotes."
        )
    _report_ignored(others)
    _refuse_damaged(images)
    return images


def _has_folders(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_dir() for path in folder.iterdir())


def _refuse_damaged(files: Sequence[Path]) -> None:
    """Raise an error that names all files whose headers are not those of images."""
    complaints = []
    for file in files:
        try:
            check_image(file)
        except ValueError as error:
            complaints.append(str(error))
    if complaints:
        raise ValueError(" ".join(complaints[:5] + [f"(and {len(complaints) - 5} more)"] * (len(complaints) > 5)))


def _report_ignored(others: Sequence[Path]) -> None:
    if others:
        listed = ", ".join(str(path) for path in others[:5]) + (
            f" and {len(others) - 5} more" if len(others) > 5 else ""
        )
        rank_zero_info(f"Ignored, since they are not images ({', '.join(EXTENSIONS)}) of a class: {listed}.")
