"""Finds image files and decodes them to RGB."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""Image formats that are read. Other decoders of Pillow run programs or are hardly tested."""


def read_image(path: Path) -> Image.Image:
    """Return an image in RGB with the orientation of its EXIF data, or the first frame of an animation.

    Transparent pixels are blended with white, and 16 bits per channel are reduced to 8.

    Raises:
        ValueError: If the file is damaged, not an image, or has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    with _opened(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            levels = np.asarray(upright).astype(np.float64) / 257
            upright = Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))
        if upright.has_transparency_data:
            transparent = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", transparent.size, "white"), transparent)
        return upright.convert("RGB")


def check_image(path: Path) -> None:
    """Check the header of an image, which detects most files that are not images.

    Raises:
        ValueError: For the reasons of `read_image`.
    """
    with _opened(path):
        pass


def images_in(folder: Path, *, below: bool = False) -> tuple[list[Path], list[Path]]:
    """Return the images in a folder by extension, and the other files.

    Args:
        folder: The folder.
        below: Whether to include subfolders.
    """
    found = folder.rglob("*") if below else folder.iterdir()
    return images_among(path for path in found if not (below and path.is_dir()))


def images_among(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Return the images among these paths by extension and the other files, both sorted and without hidden files."""
    images: list[Path] = []
    others: list[Path] = []
    for path in sorted(path for path in paths if not path.name.startswith(".")):
        is_image = path.suffix.lower() in EXTENSIONS and path.is_file()
        (images if is_image else others).append(path)
    return images, others


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                yield image
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(
            f"{path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels, a limit that protects the memory. Make it "
            "smaller, or raise PIL.Image.MAX_IMAGE_PIXELS."
        ) from None
    except Exception as error:  # noqa: BLE001 - decoders raise whatever comes of a damaged file
        reason = str(error).replace(f" {str(path)!r}", "") or type(error).__name__
        if path.stat().st_size == 0:
            reason = "it is empty"
        raise ValueError(
            f"{path} is damaged, or not a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} image ({reason}). Remove or "
            "replace it."
        ) from None
