"""Images of every kind: read as they look, or refused by name."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from lora_lightning.data import images
from lora_lightning.data.images import check_image, images_in, read_image


def halves(mode: str, left: object, right: object) -> Image.Image:
    """20 x 10, of two colours."""
    image = Image.new(mode, (20, 10), left)  # type: ignore[arg-type]
    image.paste(right, (10, 0, 20, 10))  # type: ignore[arg-type]
    return image


def colours(image: Image.Image) -> tuple[object, object]:
    assert image.mode == "RGB"
    return image.getpixel((2, 5)), image.getpixel((17, 5))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (halves("RGB", (255, 0, 0), (0, 0, 255)), ((255, 0, 0), (0, 0, 255))),
        (halves("L", 40, 200), ((40, 40, 40), (200, 200, 200))),
        (halves("1", 0, 1), ((0, 0, 0), (255, 255, 255))),
        (halves("RGBA", (255, 0, 0, 255), (0, 0, 255, 0)), ((255, 0, 0), (255, 255, 255))),
        (halves("LA", (40, 255), (40, 0)), ((40, 40, 40), (255, 255, 255))),
        (halves("RGB", (255, 0, 0), (0, 0, 255)).quantize(2), ((255, 0, 0), (0, 0, 255))),
        (
            Image.fromarray(np.repeat([[257 * 40] * 10 + [257 * 200] * 10], 10, 0).astype(np.uint16)),
            ((40,) * 3, (200,) * 3),
        ),
    ],
    ids=["rgb", "greyscale", "black and white", "alpha", "greyscale with alpha", "palette", "16 bits"],
)  # fmt: skip
def test_a_image_is_read_as_it_looks(image: Image.Image, expected: object, tmp_path: Path) -> None:
    image.save(tmp_path / "a.png")
    assert colours(read_image(tmp_path / "a.png")) == expected


def test_a_transparent_colour_of_a_palette_is_white(tmp_path: Path) -> None:
    image = halves("RGB", (255, 0, 0), (0, 0, 255)).quantize(2)
    image.save(tmp_path / "a.png", transparency=image.getpixel((17, 5)))
    assert colours(read_image(tmp_path / "a.png")) == ((255, 0, 0), (255, 255, 255))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_exif_data_say(orientation: int, tmp_path: Path) -> None:
    image = halves("RGB", (255, 0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    read = read_image(tmp_path / "a.png")
    assert read.size == ((20, 10) if orientation <= 4 else (10, 20))
    assert read.tobytes() == ImageOps.exif_transpose(Image.open(tmp_path / "a.png")).tobytes()


def test_a_cmyk_jpeg_is_read(tmp_path: Path) -> None:
    halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)).save(tmp_path / "a.jpg", quality=100)
    left, right = colours(read_image(tmp_path / "a.jpg"))
    assert left[0] > 200
    assert left[2] < 60
    assert right[0] < 60
    assert right[2] > 200


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "bmp"])
def test_a_truncated_image_is_refused_by_name(extension: str, tmp_path: Path) -> None:
    file = io.BytesIO()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(file, format={"jpg": "JPEG"}.get(extension, extension.upper()))
    path = tmp_path / f"holiday.{extension}"
    path.write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    with pytest.raises(
        ValueError, match=rf"holiday.{extension} is damaged, or not a JPEG, PNG, WEBP or BMP image \(.+\)"
    ):
        read_image(path)


def test_what_is_empty_or_no_image_is_refused_by_its_header(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "notes.jpg").write_text("Buy fish food.")
    with pytest.raises(ValueError, match=r"empty.jpg is damaged, or not a .* image \(it is empty\). Remove"):
        check_image(tmp_path / "empty.jpg")
    with pytest.raises(ValueError, match=r"notes.jpg is damaged, or not a .* image \(cannot identify image file\)"):
        check_image(tmp_path / "notes.jpg")


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "EPS", "PPM"])
def test_no_other_decoder_is_asked_whatever_the_name(kind: str, tmp_path: Path) -> None:
    halves("RGB", (255, 0, 0), (0, 0, 255)).save(tmp_path / "a", format=kind)
    (tmp_path / "a").rename(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a.jpg is damaged, or not a JPEG, PNG, WEBP or BMP image"):
        check_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("times", [1.5, 3])
def test_a_huge_image_is_refused_before_it_is_decoded(
    times: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "huge.png")
    monkeypatch.setattr(images.Image, "MAX_IMAGE_PIXELS", int(10_000 / times))
    with pytest.raises(ValueError, match=rf"huge.png has more than {int(10_000 / times):,} pixels"):
        check_image(tmp_path / "huge.png")


def test_a_missing_image_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "a.jpg")


def test_images_are_found_by_extension_and_hidden_files_are_none(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.jpeg", "c.webp", "d.txt", ".e.png", "Thumbs.db"):
        (tmp_path / name).touch()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "f.bmp").touch()
    found, others = images_in(tmp_path)
    assert [path.name for path in found] == ["a.jpeg", "b.JPG", "c.webp"]
    assert [path.name for path in others] == ["Thumbs.db", "d.txt", "more"]
    found, others = images_in(tmp_path, below=True)
    assert [path.name for path in found] == ["a.jpeg", "b.JPG", "c.webp", "f.bmp"]
    assert [path.name for path in others] == ["Thumbs.db", "d.txt"]
