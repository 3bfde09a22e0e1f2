"""Folders of pictures: which there are, and what lies in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from lora_lightning.data.categories import indices_of
from lora_lightning.data.pictures import EXTENSIONS, check_picture, pictures_among, pictures_in

PARTS = ("train", "val", "test")
Labelled = tuple[list[Path], list[int]]
"""Pictures, and their class indices."""


def part_folders(root: Path) -> dict[str, Path]:
    """The parts that have a folder of class folders of their own; else the whole is the training part.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there are parts, but none to train on.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder; expected one with a folder of pictures a class.")
    parts = {part: root / part for part in PARTS if _has_folders(root / part)}
    if parts and "train" not in parts:
        raise ValueError(
            f"{root} has class folders in {', '.join(f'{part}/' for part in parts)}, but none in train/; expected "
            "train/<class name>/ beside them."
        )
    return parts or {"train": root}


def class_folders(folder: Path) -> list[Path]:
    """The folders in it, sorted by name; hidden ones do not count.

    Raises:
        ValueError: If there are none.
    """
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        pictures, _ = pictures_in(folder)
        what = f"{len(pictures)} pictures, but no folders" if pictures else "no folders"
        raise ValueError(f"{folder} has {what} in it; expected a folder of pictures a class: {folder}/<class name>/.")
    return found


def labelled_pictures(folder: Path, class_names: Sequence[str]) -> Labelled:
    """The pictures in a folder's class folders, with their class indices.

    Raises:
        ValueError: If a folder is of no class or has no pictures, or a file is no picture.
    """
    found = class_folders(folder)
    indices = indices_of([each.name for each in found], class_names, str(folder))
    files: list[Path] = []
    targets: list[int] = []
    passed_over: list[Path] = []
    for class_folder, index in zip(found, indices, strict=True):
        pictures, others = pictures_in(class_folder)
        if not pictures:
            raise ValueError(
                f"{class_folder} has no pictures ({', '.join(EXTENSIONS)}) in it. Fill it, or remove the folder."
            )
        files += pictures
        targets += [index] * len(pictures)
        passed_over += others
    _say_what_is_passed_over(passed_over)
    _refuse_damaged(files)
    return files, targets


def pictures_to_predict(where: Path) -> list[Path]:
    """The picture that this is, those in and below the folder that this is, or those that this glob pattern matches.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If a file is no picture.
    """
    others: list[Path] = []
    if where.is_dir():
        pictures, others = pictures_in(where, below=True)
    elif where.is_file():
        pictures = [where]
    else:
        pattern = str(where.relative_to(where.anchor))
        pictures, others = pictures_among(path for path in Path(where.anchor).glob(pattern) if path.is_file())
    if not pictures:
        raise FileNotFoundError(
            f"{where} is or matches no picture; expected a picture ({', '.join(EXTENSIONS)}), a folder of them, or a glob "
            "pattern in quotes."
        )
    _say_what_is_passed_over(others)
    _refuse_damaged(pictures)
    return pictures


def _has_folders(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_dir() for path in folder.iterdir())


def _refuse_damaged(files: Sequence[Path]) -> None:
    """Names all files that are no pictures, as far as headers tell."""
    complaints = []
    for file in files:
        try:
            check_picture(file)
        except ValueError as error:
            complaints.append(str(error))
    if complaints:
        raise ValueError(" ".join(complaints[:5] + [f"(and {len(complaints) - 5} more)"] * (len(complaints) > 5)))


def _say_what_is_passed_over(others: Sequence[Path]) -> None:
    if others:
        listed = ", ".join(str(path) for path in others[:5]) + (
            f" and {len(others) - 5} more" if len(others) > 5 else ""
        )
        rank_zero_info(f"Passed over, since they are no pictures ({', '.join(EXTENSIONS)}) of a class: {listed}.")
