"""Drawings with known content, from which the miniature benchmarks take their questions and true answers."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

COLOURS = {
    "red": (205, 40, 40),
    "green": (30, 140, 60),
    "blue": (40, 80, 200),
    "yellow": (235, 200, 40),
    "purple": (125, 50, 150),
    "black": (20, 20, 20),
}
KINDS = ("circle", "square", "triangle", "star")
SIZES = ((224, 224), (336, 224), (224, 336), (420, 280), (320, 240), (448, 168))  # width, height in pixels


@dataclass(frozen=True)
class Shape:
    """One coloured shape, `column` 0 being the leftmost of the scene."""

    colour: str
    kind: str
    column: int

    def __str__(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """A picture of shapes in a row, no two of the same colour or kind."""

    image: Image.Image
    shapes: tuple[Shape, ...]

    @property
    def absent(self) -> Shape:
        """A shape whose kind and colour are not in the picture."""
        colours, kinds = ({getattr(shape, name) for shape in self.shapes} for name in ("colour", "kind"))
        return Shape(
            next(colour for colour in COLOURS if colour not in colours), next(k for k in KINDS if k not in kinds), -1
        )


def draw_scene(rng: random.Random, count: int | None = None) -> Scene:
    """Draw `count` shapes (at most 3; drawn from `rng` if not given) on a shaded ground of one of `SIZES`."""
    count = rng.randint(1, 3) if count is None else count
    width, height = rng.choice(SIZES)
    image = _ground(rng, width, height)
    pen = ImageDraw.Draw(image)
    pairs = zip(rng.sample(sorted(COLOURS), count), rng.sample(KINDS, count), strict=True)
    shapes = tuple(Shape(colour, kind, column) for column, (colour, kind) in enumerate(pairs))
    cell = width / count
    for shape in shapes:
        radius = min(cell, height) * rng.uniform(0.25, 0.42)
        middle = (cell * (shape.column + 0.5), height * rng.uniform(0.45, 0.55))
        _draw_shape(pen, shape, middle, radius)
    return Scene(image, shapes)


def draw_sign(rng: random.Random, text: str) -> Image.Image:
    """Draw a coloured board that bears `text`, cut to fit, on a shaded ground of one of `SIZES`."""
    width, height = rng.choice(SIZES)
    image = _ground(rng, width, height)
    pen = ImageDraw.Draw(image)
    board = (width * 0.08, height * 0.25, width * 0.92, height * 0.75)
    pen.rounded_rectangle(board, radius=8, fill=COLOURS[rng.choice(sorted(COLOURS))], outline="white", width=3)
    size = min(height * 0.3, 1.3 * width * 0.8 / max(4, len(text)))
    pen.text((width / 2, height / 2), text, fill="white", font=_font(size), anchor="mm", stroke_width=1)
    return image


def draw_page(title: str, lines: list[str], size: tuple[int, int]) -> Image.Image:
    """Draw a white page of `size` (width, height in pixels): a headline, a rule and `lines` below each other."""
    width, height = size
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    margin = width // 12
    pen.text((margin, margin), title, fill="black", font=_font(width / 14))
    pen.line((margin, margin * 2.4, width - margin, margin * 2.4), fill="black", width=2)
    step = min(width / 10, (height - 4 * margin) / max(1, len(lines)))
    for number, line in enumerate(lines):
        pen.text((margin, 3 * margin + number * step), line, fill=(40, 40, 40), font=_font(step * 0.6))
    return image


def draw_infographic(rng: random.Random, title: str, bars: dict[str, int], size: tuple[int, int]) -> Image.Image:
    """Draw a long picture of `size` (width, height in pixels) of labelled bars, in percent of its width."""
    width, height = size
    image = _ground(rng, width, height)
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, width, width * 0.25), fill=(30, 60, 110))
    pen.text((width / 2, width * 0.125), title, fill="white", font=_font(width / 12), anchor="mm")
    step = (height - width * 0.3) / len(bars)
    for row, ((label, percent), colour) in enumerate(zip(bars.items(), COLOURS.values(), strict=False)):
        top = width * 0.3 + row * step
        pen.text((width * 0.06, top), f"{label}: {percent}%", fill="black", font=_font(width / 14))
        end = width * (0.06 + 0.88 * percent / 100)
        pen.rectangle((width * 0.06, top + width * 0.12, end, top + step * 0.8), fill=colour)
    return image


def _ground(rng: random.Random, width: int, height: int) -> Image.Image:
    slope = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((width, height))
    low, high = (tuple(rng.randint(150, 250) for _ in range(3)) for _ in range(2))
    return ImageOps.colorize(slope, low, high)


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(8, round(size)))


def _draw_shape(pen: ImageDraw.ImageDraw, shape: Shape, middle: tuple[float, float], radius: float) -> None:
    x, y = middle
    fill = COLOURS[shape.colour]
    if shape.kind == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape.kind == "square":
        pen.rectangle((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape.kind == "triangle":
        pen.regular_polygon((x, y, radius * 1.2), 3, fill=fill)
    else:
        pen.regular_polygon((x, y, radius), 3, fill=fill)
        pen.regular_polygon((x, y, radius), 3, rotation=180, fill=fill)
