"""Drawings with known content: shapes, signs, forms and charts, and what stands in every part of them.

A picture's letters stand at least a twelfth of its longer side apart, and at least 28 pixels: so each has a visual
token of its own in a 12 x 12 grid over the square around the picture (LLaVA) and in tokens of 28 x 28 pixels (Qwen).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont, ImageOps

from lmms_prune.demo.content import COLOURS, HEADS, Chart, Content, Form, Grid, Scene, Sign

PITCH = 28  # pixels between letters, at least
CELLS = 12  # letters along the longer side, at most
Pixels = int | float
SCENE_SIZES = ((224, 224), (252, 196), (196, 252), (252, 252))  # width, height in pixels, multiples of 28


@dataclass(frozen=True)
class Mark:
    """What stands in a `box` (left, top, right, bottom, in pixels) of a picture; an empty text says nothing."""

    box: tuple[Pixels, Pixels, Pixels, Pixels]
    kind: str = ""
    colour: str = ""
    letter: str = ""
    place: int = 0  # of a letter of a value or on a sign: the first, second, … of it
    entry: str = ""  # of a letter of a value: the key or label that it is looked up by
    column: str = ""  # and the heading it stands below


@dataclass(frozen=True)
class Picture:
    """An image, what it shows, and where."""

    image: Image.Image
    content: Content
    marks: tuple[Mark, ...]


class _Pen:
    """Draws on one image and notes what it drew."""

    def __init__(self, image: Image.Image) -> None:
        self.image, self.marks, self.draw = image, [], ImageDraw.Draw(image)  # type: ignore[var-annotated]

    def text(
        self, text: str, left: Pixels, top: Pixels, pitch: Pixels, fill: str = "black", first: int = 0, **part: str
    ) -> None:
        """One letter a cell of `pitch` x `pitch` pixels, the first at (left, top); `first` is its `place`, if any."""
        font = _font(round(pitch * 1.1))
        for place, letter in enumerate(text):
            x, y = left + (place + 0.5) * pitch, top + pitch / 2
            if letter != " ":
                self.draw.text((x, y), letter, fill=fill, font=font, anchor="mm")
                self.marks.append(Mark((x, y, x, y), letter=letter, place=first + place if first else 0, **part))

    def box(self, box: tuple[Pixels, Pixels, Pixels, Pixels], kind: str, colour: str) -> None:
        self.draw.rounded_rectangle(box, radius=4, fill=COLOURS[colour], outline=(60, 60, 60))
        self.marks.append(Mark(box, kind=kind, colour=colour))

    def done(self, content: Content) -> Picture:
        return Picture(self.image, content, tuple(self.marks))


def draw(rng: random.Random, content: Content) -> Picture:
    """Draw `content`; `rng` decides what it leaves open: sizes, places and the ground."""
    if isinstance(content, Scene):
        return _scene(rng, content)
    if isinstance(content, Sign):
        return _sign(rng, content)
    if isinstance(content, Grid):
        return _grid(rng, content)
    return _form(rng, content) if isinstance(content, Form) else _chart(rng, content)


def _scene(rng: random.Random, scene: Scene) -> Picture:
    width, height = rng.choice(SCENE_SIZES)
    pen = _Pen(_ground(rng, width, height))
    across, down = width / 3, height / 3
    for thing in scene.things:
        radius = min(across, down) * (rng.uniform(0.4, 0.46) if thing.large else rng.uniform(0.22, 0.27))
        room = min(across, down) / 2 - radius
        x = (thing.column + 0.5) * across + rng.uniform(-room, room)
        y = (thing.row + 0.5) * down + rng.uniform(-room, room)
        _shape(pen.draw, thing.kind, COLOURS[thing.colour], x, y, radius)
        pen.marks.append(Mark((x - radius, y - radius, x + radius, y + radius), thing.kind, thing.colour))
    return pen.done(scene)


def _sign(rng: random.Random, sign: Sign) -> Picture:
    longest = max(map(len, sign.lines))  # at most 7 letters
    width, height = rng.choice((280, 308, 336)), rng.choice((140, 196, 252))
    pitch = max(PITCH, width / CELLS) * rng.uniform(1, 1.3)
    pen = _Pen(_ground(rng, width, height))
    wide, tall = longest * pitch, len(sign.lines) * pitch * 1.15
    left = rng.uniform(6, max(6, width - wide - 6))
    top = rng.uniform(10, max(10, height - tall - 10))
    pen.box((left - 4, top - 6, left + wide + 4, top + tall + 6), "board", sign.colour)
    fill = "black" if sign.colour == "yellow" else "white"
    for number, line in enumerate(sign.lines):
        first = 1 + sum(map(len, sign.lines[:number]))
        pen.text(line, left + (wide - len(line) * pitch) / 2, top + number * pitch * 1.15, pitch, fill, first)
    return pen.done(sign)


def _form(rng: random.Random, form: Form) -> Picture:
    columns = max(len(key) + 1 + len(value) for key, value in form.fields)
    width = min(336, (columns + rng.randint(0, max(0, 12 - columns))) * PITCH)
    rows = len(form.fields)
    height = min(336, 28 * round((rows * rng.uniform(1.2, 1.6)) + 1))
    pen = _Pen(Image.new("RGB", (width, height), rng.choice(("white", (250, 246, 235), (238, 243, 250)))))
    pen.draw.rectangle((2, 2, width - 3, height - 3), outline=(120, 120, 120))
    step = height / rows
    indent = rng.randint(0, width // PITCH - columns) * PITCH
    gap = max(len(key) for key, _ in form.fields) + 1
    for number, (key, value) in enumerate(form.fields):
        top = number * step + (step - PITCH) / 2
        pen.text(key, 0, top, PITCH)
        left = gap * PITCH + indent if width // PITCH >= gap + len(value) else 0
        pen.text(value, left, top, PITCH, first=1, entry=key)
    return pen.done(form)


def _grid(rng: random.Random, grid: Grid) -> Picture:
    """Labels on the left; each number stands below its heading, between ruled lines."""
    lines = [("", HEADS), *((label, tuple(map(str, numbers))) for label, numbers in grid.rows)]
    width, step = 12 * PITCH, rng.choice((42, 49, 56))
    height = 28 * round((len(lines) * step + 14) / 28)
    pen = _Pen(Image.new("RGB", (width, height), "white"))
    for number, (label, cells) in enumerate(lines):
        top = 7 + number * step + (step - PITCH) / 2
        pen.draw.line((4, 7 + (number + 1) * step, width - 4, 7 + (number + 1) * step), fill=(170, 170, 170))
        pen.text(label, 0, top, PITCH)
        for left, head, cell in zip((5, 9), HEADS, cells, strict=True):
            pen.text(cell, left * PITCH, top, PITCH, first=int(bool(label)), entry=label, column=head if label else "")
    return pen.done(grid)


def _chart(rng: random.Random, chart: Chart) -> Picture:
    """Tall: a label, and below it the number and a bar beside it. Wide: columns, the number over the label."""
    colours = rng.sample(sorted(COLOURS), len(chart.bars))
    pitch = 448 / CELLS
    width, height = (224, 448) if chart.tall else (448, 224)
    pen = _Pen(_ground(rng, width, height))
    if chart.tall:
        step = height / len(chart.bars)
        for number, ((label, value), colour) in enumerate(zip(chart.bars, colours, strict=True)):
            top = number * step + (step - 2.1 * pitch) / 2
            pen.text(label, 8, top, pitch)
            pen.text(str(value), 8, top + 1.05 * pitch, pitch, first=1, entry=label)
            left = 16 + 2 * pitch
            pen.box((left, top + 1.2 * pitch, left + 8 + value * 1.15, top + 1.95 * pitch), "bar", colour)
        return pen.done(chart)
    step = width / len(chart.bars)
    for number, ((label, value), colour) in enumerate(zip(chart.bars, colours, strict=True)):
        left = number * step + (step - len(label) * pitch) / 2
        top = 132 - value * 0.9
        pen.box((left + 8, top, left + 2 * pitch, 140), "bar", colour)
        pen.text(label, left, 224 - 1.6 * pitch, pitch)
        pen.text(str(value), left, top - pitch - 2, pitch, first=1, entry=label)
    return pen.done(chart)


def _ground(rng: random.Random, width: int, height: int) -> Image.Image:
    slope = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((width, height))
    low, high = (tuple(rng.randint(185, 250) for _ in range(3)) for _ in range(2))
    return ImageOps.colorize(slope, low, high)


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _shape(
    pen: ImageDraw.ImageDraw, kind: str, fill: tuple[int, int, int], x: Pixels, y: Pixels, radius: Pixels
) -> None:
    if kind == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif kind == "square":
        side = radius * 0.88
        pen.rectangle((x - side, y - side, x + side, y + side), fill=fill)
    elif kind == "triangle":
        pen.regular_polygon((x, y + radius * 0.1, radius), 3, fill=fill)
    elif kind == "star":
        pen.regular_polygon((x, y, radius), 3, fill=fill)
        pen.regular_polygon((x, y, radius), 3, rotation=180, fill=fill)
    else:
        arm = radius * 0.34
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
