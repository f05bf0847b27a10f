"""Draws pictures with known content: shapes, signs, forms, tables and charts, and records what is where.

Letters are drawn in cells of 28 x 28 pixels, in pictures of 336 pixels on the longer side. Each cell is one visual token
of both models: Qwen's tokens are 28 x 28 pixels, and LLaVA's a 12 x 12 grid over the square around the picture. A vision
encoder of this size would need far more training to read letters that cross the borders of tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont, ImageOps

from lmms_prune.demo.content import COLOURS, HEADS, Chart, Content, Form, NumberTable, Scene, Sign

CELL = 28  # pixels
CELLS = 12  # along the longer side of a picture with letters
Pixels = int | float
ACROSS, DOWN = ("left", "", "right"), ("above", "", "below")  # as questions word them; empty for the middle
SCENE_SIZES = ((224, 224), (252, 196), (196, 252), (252, 252))  # width, height in pixels, multiples of 28


@dataclass(frozen=True)
class Mark:
    """The content of a `box` (left, top, right, bottom, in pixels) of a picture; an empty text means nothing."""

    box: tuple[Pixels, Pixels, Pixels, Pixels]
    kind: str = ""
    colour: str = ""
    letter: str = ""
    place: int = 0  # a letter's number in its value or on its sign, from 1
    entry: str = ""  # for a letter of a value: the key or label that the value belongs to
    column: str = ""  # for a letter in a table: the heading of its column
    size: str = ""  # a shape's size: large or small
    across: str = ""  # the outer third of the picture that a shape is in: left or right
    down: str = ""  # the same vertically: above or below


@dataclass(frozen=True)
class Picture:
    """An image, its content, and the marks that say what is where."""

    image: Image.Image
    content: Content
    marks: tuple[Mark, ...]


class _Pen:
    """Draws on one image, and records a mark for everything drawn."""

    def __init__(self, image: Image.Image) -> None:
        self.image, self.marks, self.draw = image, [], ImageDraw.Draw(image)  # type: ignore[var-annotated]

    def text(
        self, text: str, left: int, top: int, fill: str = "black", size: int = 31, first: int = 0, **part: str
    ) -> None:
        """Write one letter per cell, starting in column `left` and row `top`.

        `first` is the first letter's `Mark.place`, or 0 for none; `size` is the font size; `part` sets further fields.
        """
        font = _font(size)
        for index, letter in enumerate(text):
            x, y = (left + index + 0.5) * CELL, (top + 0.5) * CELL
            if letter != " ":
                self.draw.text((x, y), letter, fill=fill, font=font, anchor="mm")
                self.marks.append(Mark((x, y, x, y), letter=letter, place=first + index if first else 0, **part))

    def box(self, box: tuple[Pixels, Pixels, Pixels, Pixels], kind: str, colour: str) -> None:
        """Draw a filled box."""
        self.draw.rounded_rectangle(box, radius=4, fill=COLOURS[colour], outline=(60, 60, 60))
        self.marks.append(Mark(box, kind=kind, colour=colour))

    def done(self, content: Content) -> Picture:
        """The finished picture."""
        return Picture(self.image, content, tuple(self.marks))


def draw(rng: random.Random, content: Content) -> Picture:
    """Draw `content`; `rng` decides the rest: sizes, positions and the background."""
    if isinstance(content, Scene):
        return _scene(rng, content)
    if isinstance(content, Sign):
        return _sign(rng, content)
    if isinstance(content, NumberTable):
        return _number_table(rng, content)
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
        pen.marks.append(
            Mark(
                (x - radius, y - radius, x + radius, y + radius),
                thing.kind,
                thing.colour,
                size="large" if thing.large else "small",
                across=ACROSS[thing.column],
                down=DOWN[thing.row],
            )
        )
    return pen.done(scene)


def _sign(rng: random.Random, sign: Sign) -> Picture:
    longest, lines = max(map(len, sign.lines)), len(sign.lines)  # at most 7 letters, 2 lines
    rows = rng.choice((4, 6, 8))
    pen = _Pen(_ground(rng, CELLS * CELL, rows * CELL))
    column, row = rng.randint(0, CELLS - longest), rng.randint(0, rows - lines)
    left, top = column * CELL, row * CELL
    pen.box((left, top, left + longest * CELL - 1, top + lines * CELL - 1), "board", sign.colour)
    fill, size = "black" if sign.colour == "yellow" else "white", rng.randint(24, 31)
    for number, line in enumerate(sign.lines):
        first = 1 + sum(map(len, sign.lines[:number]))
        pen.text(line, column + (longest - len(line)) // 2, row + number, fill, size, first)
    return pen.done(sign)


def _form(rng: random.Random, form: Form) -> Picture:
    """Draw one line per key and value; lines are one or two cells apart, if there is room for two."""
    count = len(form.fields)
    step = rng.choice((1, 2)) if 2 * count <= CELLS else 1
    rows = _rows(count * step)
    pen = _Pen(_paper(rng, rows))
    gap = max(len(key) for key, _ in form.fields) + 1
    values = gap + rng.randint(0, CELLS - gap - max(len(value) for _, value in form.fields))
    above = rng.randint(0, rows - count * step)
    for number, (key, value) in enumerate(form.fields):
        row = above + number * step
        pen.text(key, 0, row)
        pen.text(value, values, row, first=1, entry=key)
    return pen.done(form)


def _number_table(rng: random.Random, table: NumberTable) -> Picture:
    """Draw labels on the left and each number below its heading, between ruled lines."""
    lines = [("", HEADS), *((label, tuple(map(str, numbers))) for label, numbers in table.rows)]
    step = rng.choice((1, 2))
    rows = _rows(len(lines) * step)
    pen = _Pen(_paper(rng, rows))
    for number, (label, cells) in enumerate(lines):
        ruled = (number + 1) * step * CELL
        pen.draw.line((4, ruled, CELLS * CELL - 4, ruled), fill=(170, 170, 170))
        pen.text(label, 0, number * step)
        for left, head, cell in zip((5, 9), HEADS, cells, strict=True):
            pen.text(cell, left, number * step, first=int(bool(label)), entry=label, column=head if label else "")
    return pen.done(table)


def _chart(rng: random.Random, chart: Chart) -> Picture:
    """Draw a tall chart (below each label its number, with a bar to the right) or a wide one (columns above labels)."""
    colours = rng.sample(sorted(COLOURS), len(chart.bars))
    step = CELLS // len(chart.bars)
    if chart.tall:
        pen = _Pen(_ground(rng, 6 * CELL, CELLS * CELL))
        for number, ((label, value), colour) in enumerate(zip(chart.bars, colours, strict=True)):
            row = number * step
            pen.text(label, 0, row)
            pen.text(str(value), 0, row + 1, first=1, entry=label)
            left, top = 2 * CELL + 4, (row + 1) * CELL
            pen.box((left, top + 4, left + 6 + value, top + CELL - 4), "bar", colour)
        return pen.done(chart)
    pen = _Pen(_ground(rng, CELLS * CELL, 6 * CELL))
    for number, ((label, value), colour) in enumerate(zip(chart.bars, colours, strict=True)):
        column, bottom = number * step, 5 * CELL - 4
        over = 3 - value // 25  # the row of the cell above the bar, for the number
        pen.box((column * CELL + 4, bottom - 0.96 * value, (column + 2) * CELL - 4, bottom), "bar", colour)
        pen.text(label, column, 5)
        pen.text(str(value), column, over, first=1, entry=label)
    return pen.done(chart)


def _rows(least: int) -> int:
    """The number of rows of a page: even, so that the margins in the square around it are whole cells."""
    return min(CELLS, least + 2 - least % 2)


def _paper(rng: random.Random, rows: int) -> Image.Image:
    colour = rng.choice(("white", (250, 246, 235), (238, 243, 250)))
    return Image.new("RGB", (CELLS * CELL, rows * CELL), colour)


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
