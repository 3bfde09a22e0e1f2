"""Draws the five goldfish that come with the package.

Call `python examples/draw_goldfish.py <folder>`. Each is drawn four times as large and
reduced, from a fixed seed.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

SCALE = 4
Point = tuple[float, float]


def curve(points: list[Point], steps: int = 24) -> list[Point]:
    """Return a closed Catmull-Rom curve through the points."""
    out: list[Point] = []
    count = len(points)
    for i in range(count):
        p0, p1, p2, p3 = (points[(i + k - 1) % count] for k in range(4))
        for step in range(steps):
            t = step / steps
            out.append(
                tuple(  # type: ignore[arg-type]
                    0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
                    for a, b, c, d in zip(p0, p1, p2, p3, strict=True)
                )
            )
    return out


def water(
    size: tuple[int, int], top: tuple[int, int, int], bottom: tuple[int, int, int], draw: random.Random
) -> Image.Image:
    column = Image.new("RGB", (1, 256))
    for y in range(256):
        column.putpixel((0, y), tuple(round(a + (b - a) * y / 255) for a, b in zip(top, bottom, strict=True)))
    image = column.resize(size, Image.Resampling.BICUBIC)
    light = Image.new("L", size)
    pen = ImageDraw.Draw(light)
    for _ in range(14):
        x, width = draw.uniform(0, size[0]), draw.uniform(20, 90) * SCALE / 2
        pen.polygon([(x, 0), (x + width, 0), (x + width * 2.2 - 200, size[1]), (x + width - 260, size[1])], fill=26)
    light = light.filter(ImageFilter.GaussianBlur(14 * SCALE))
    return Image.composite(Image.new("RGB", size, "white"), image, light)


def weeds(image: Image.Image, draw: random.Random, count: int) -> None:
    pen = ImageDraw.Draw(image)
    width, height = image.size
    for _ in range(count):
        x, tall, sway = draw.uniform(0, width), draw.uniform(0.25, 0.7) * height, draw.uniform(-0.1, 0.1) * width
        green = (draw.randint(10, 50), draw.randint(80, 140), draw.randint(40, 80))
        for step in range(60):
            t = step / 60
            thick = (1 - t) * 7 * SCALE
            at = x + sway * t**2 + math.sin(t * 9) * 6 * SCALE
            pen.ellipse([at - thick, height - t * tall - thick, at + thick, height - t * tall + thick], fill=green)


def fish(length: float, body: tuple[int, int, int], draw: random.Random) -> Image.Image:
    """Return a goldfish that looks to the left, on nothing."""
    size = (round(length * 1.5), round(length * 1.1))
    layer = Image.new("RGBA", size)
    cx, cy, a, b = length * 0.5, length * 0.55, length * 0.38, length * draw.uniform(0.22, 0.27)
    fin = (min(body[0] + 8, 255), min(body[1] + 50, 255), body[2] + 30, 190)

    def shape(points: list[Point], fill: tuple[int, ...]) -> None:
        one = Image.new("RGBA", size)
        ImageDraw.Draw(one).polygon(curve([(cx + x * a, cy + y * b) for x, y in points]), fill=fill)
        layer.alpha_composite(one)

    wave = draw.uniform(-0.25, 0.25)
    shape(
        [
            (0.75, 0),
            (1.5, -1.25 + wave),
            (2.15, -1.5 + wave),
            (1.85, -0.5),
            (1.55, 0.05),
            (1.9, 0.7),
            (2.1, 1.6 + wave),
            (1.4, 1.1),
        ],
        fin,
    )
    shape([(-0.35, -0.7), (-0.1, -1.75), (0.35, -1.6), (0.75, -1.0), (0.7, -0.4), (0.1, -0.5)], fin)
    shape([(0.25, 0.55), (0.65, 1.5), (0.95, 1.35), (0.75, 0.5)], fin)
    shape(
        [
            (-1, 0.05),
            (-0.75, -0.6),
            (0, -0.98),
            (0.6, -0.62),
            (1.0, -0.12),
            (1.0, 0.12),
            (0.6, 0.62),
            (0, 0.98),
            (-0.75, 0.7),
        ],
        (*body, 255),
    )
    solid = layer.getchannel("A").point(lambda value: 255 if value > 200 else 0)
    shade = Image.new("RGBA", size)
    pen = ImageDraw.Draw(shade)
    for step in range(40):  # a pale belly and a darker back
        t = step / 40
        y = cy + b * (1 - 0.9 * t)
        pen.ellipse([cx - a * (1 - t), y - b * 0.5, cx + a * (1 - t), y + b * 0.5], fill=(255, 236, 180, round(90 * t)))
    pen.ellipse([cx - a * 0.95, cy - b * 1.35, cx + a * 0.95, cy - b * 0.35], fill=(150, 40, 0, 60))
    for row in range(-4, 5):  # scales
        for column in range(-3, 8):
            x, y, r = cx + (column + row % 2 / 2) * a * 0.12, cy + row * b * 0.2, a * 0.085
            pen.arc([x - r, y - r, x + r, y + r], 100, 260, fill=(180, 60, 0, 120), width=max(1, SCALE // 2))
    shade = shade.filter(ImageFilter.GaussianBlur(SCALE))
    shade.putalpha(Image.composite(shade.getchannel("A"), Image.new("L", size), solid))
    layer.alpha_composite(shade)
    shape([(-0.3, 0.35), (0.2, 0.9), (0.42, 0.75), (0.1, 0.3)], fin)
    pen = ImageDraw.Draw(layer)
    pen.arc(
        [cx - a * 0.75, cy - b * 0.55, cx - a * 0.3, cy + b * 0.65], 280, 80, fill=(170, 60, 10, 255), width=2 * SCALE
    )
    ex, ey, r = cx - a * 0.68, cy - b * 0.18, a * 0.1
    pen.ellipse([ex - r, ey - r, ex + r, ey + r], fill=(250, 220, 120, 255))
    pen.ellipse([ex - r * 0.65, ey - r * 0.65, ex + r * 0.65, ey + r * 0.65], fill=(20, 15, 15, 255))
    pen.ellipse([ex - r * 0.4, ey - r * 0.45, ex - r * 0.1, ey - r * 0.15], fill="white")
    pen.arc([cx - a * 1.03, cy, cx - a * 0.85, cy + b * 0.35], 200, 340, fill=(130, 40, 10, 255), width=2 * SCALE)
    return layer


def bubbles(image: Image.Image, draw: random.Random, count: int) -> None:
    layer = Image.new("RGBA", image.size)
    pen = ImageDraw.Draw(layer)
    for _ in range(count):
        x, y, r = draw.uniform(0, image.size[0]), draw.uniform(0, image.size[1]), draw.uniform(2, 7) * SCALE
        pen.ellipse(
            [x - r, y - r, x + r, y + r], fill=(255, 255, 255, 50), outline=(255, 255, 255, 150), width=SCALE // 2
        )
        pen.ellipse([x - r * 0.5, y - r * 0.6, x - r * 0.1, y - r * 0.2], fill=(255, 255, 255, 200))
    image.paste(layer, mask=layer)


def scene(seed: int, size: tuple[int, int], fishes: Sequence[tuple[float, float, float, float, bool]]) -> Image.Image:
    """Return one image; each fish is (x, y, length, angle, looks to the right), in shares of the width, and degrees."""
    draw = random.Random(seed)
    large = (size[0] * SCALE, size[1] * SCALE)
    tops = [(120, 200, 230), (90, 170, 200), (150, 215, 210), (60, 130, 190), (180, 220, 235)]
    bottoms = [(10, 70, 120), (15, 80, 80), (30, 100, 110), (5, 30, 80), (70, 130, 150)]
    image = water(large, tops[seed], bottoms[seed], draw)
    weeds(image, draw, draw.randint(5, 11))
    for x, y, length, angle, right in fishes:
        body = (draw.randint(235, 255), draw.randint(95, 140), draw.randint(0, 30))
        layer = fish(length * large[0], body, draw)
        layer = (layer.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if right else layer).rotate(
            angle, Image.Resampling.BICUBIC, expand=True
        )
        image.paste(layer, (round(x * large[0] - layer.width / 2), round(y * large[1] - layer.height / 2)), layer)
    bubbles(image, draw, 16)
    return image.resize(size, Image.Resampling.LANCZOS)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    scenes = {
        "one.jpg": (0, (320, 256), [(0.5, 0.5, 0.62, 8, False)]),
        "two.jpg": (1, (320, 256), [(0.32, 0.36, 0.42, -10, True), (0.68, 0.66, 0.45, 6, False)]),
        "close.jpg": (2, (288, 288), [(0.55, 0.5, 0.85, -6, False)]),
        "deep.webp": (3, (256, 320), [(0.5, 0.45, 0.7, 25, True)]),
        "three.png": (
            4,
            (240, 240),
            [(0.3, 0.3, 0.4, 0, False), (0.7, 0.45, 0.36, 12, False), (0.4, 0.74, 0.45, -8, True)],
        ),
    }
    for name, (seed, size, fishes) in scenes.items():
        image = scene(seed, size, fishes)
        if name.endswith(".png"):
            image.quantize(128).save(folder / name, optimize=True)
        else:
            image.save(folder / name, quality=85)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
