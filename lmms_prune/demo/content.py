"""The contents of demo pictures: random scenes, signs, forms, tables and charts, and which are held out of training."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

Split = Literal["train", "test"]

COLOURS = {
    "red": (205, 40, 40),
    "green": (30, 140, 60),
    "blue": (40, 80, 200),
    "yellow": (240, 205, 40),
    "purple": (135, 50, 160),
    "black": (20, 20, 20),
}
KINDS = ("circle", "square", "triangle", "star", "cross")
FRENCH = {"ROUGE": "red", "VERT": "green", "BLEU": "blue", "JAUNE": "yellow", "VIOLET": "purple", "NOIR": "black"}
KEYS = ("NAME", "DATE", "CITY", "CODE", "ITEM", "COST", "SHIP", "ROOM")
HEADS = ("PCS", "EUR")
LABELS = ("BUS", "CAR", "VAN", "JET", "BIKE", "TAXI", "TRAM", "BOAT")
SYMBOLS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+=/$"
_VOWELS, _CONSONANTS = "AEIOU", "BCDFGHJKLMNPRSTVWXZ"


@dataclass(frozen=True)
class Thing:
    """One shape, in a cell of a 3 x 3 grid."""

    kind: str
    colour: str
    large: bool
    column: int
    row: int

    def __str__(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """One to four shapes, no two of the same kind or colour."""

    things: tuple[Thing, ...]

    @property
    def facts(self) -> tuple[str, ...]:
        """The scene's identity: all its shapes together, regardless of their cells."""
        return (" and ".join(sorted(f"{'large' if thing.large else 'small'} {thing}" for thing in self.things)),)


@dataclass(frozen=True)
class Sign:
    """A coloured board with one or two lines; `kind` is word, words, letters, number, sum or french."""

    kind: str
    lines: tuple[str, ...]
    colour: str

    @property
    def facts(self) -> tuple[str, ...]:
        """The lines; for kinds with few possible lines, each with the board's colour."""
        few = self.kind in ("sum", "french")
        return tuple(f"{line} on {self.colour}" if few else line for line in self.lines)


@dataclass(frozen=True)
class Form:
    """A page of lines, each with a key and a value."""

    fields: tuple[tuple[str, str], ...]

    @property
    def facts(self) -> tuple[str, ...]:
        """The values: words are held out in all pictures, numbers only together with their key."""
        return tuple(value if value.isalpha() else f"{key} {value}" for key, value in self.fields)


@dataclass(frozen=True)
class NumberTable:
    """A small table: one line per label, with a number (10 to 99) below each of HEADS."""

    rows: tuple[tuple[str, tuple[int, int]], ...]

    @property
    def facts(self) -> tuple[str, ...]:
        """Each label with its numbers."""
        return tuple(f"{label} {first} {second}" for label, (first, second) in self.rows)


@dataclass(frozen=True)
class Chart:
    """Bars, each with a label and a number (10 to 99): one below the other if `tall`, else side by side."""

    bars: tuple[tuple[str, int], ...]
    tall: bool

    @property
    def facts(self) -> tuple[str, ...]:
        """Each bar's label with its number."""
        return tuple(f"{label} {value}" for label, value in self.bars)


Content = Scene | Sign | Form | NumberTable | Chart
_T = TypeVar("_T")


def held_out(fact: str) -> bool:
    """Whether `fact` is held out of training: one in eight is, by a hash of its text."""
    return hashlib.sha256(fact.encode()).digest()[0] < 32


def of_split(split: Split, draw: Callable[[], _T], facts: Callable[[_T], tuple[str, ...]]) -> _T:
    """Draw until all facts belong to `split`: test pictures have only held-out facts, training pictures have none."""
    while True:
        drawn = draw()
        if all(held_out(fact) == (split == "test") for fact in facts(drawn)):
            return drawn


def word(rng: random.Random, split: Split, least: int = 3, most: int = 5) -> str:
    """A pronounceable word of `least` to `most` capital letters that is not one of the demo's fixed words."""

    def draw_word() -> str:
        length, starts = rng.randint(least, most), rng.randrange(2)
        return "".join(rng.choice(_VOWELS if (index + starts) % 2 else _CONSONANTS) for index in range(length))

    while (drawn := of_split(split, draw_word, lambda text: (text,))) in (*KEYS, *LABELS, *FRENCH):
        pass
    return drawn


def scene(rng: random.Random, split: Split, count: int | None = None) -> Scene:
    """A scene of `count` shapes (1 to 4; a random number for None)."""

    def draw_scene() -> Scene:
        number = count or rng.randint(1, 4)
        cells = rng.sample([(column, row) for column in range(3) for row in range(3)], number)
        shapes = zip(rng.sample(KINDS, number), rng.sample(sorted(COLOURS), number), cells, strict=True)
        return Scene(tuple(Thing(kind, colour, rng.random() < 0.5, *cell) for kind, colour, cell in shapes))

    return of_split(split, draw_scene, lambda drawn: drawn.facts)


def sign(rng: random.Random, split: Split, kind: str) -> Sign:
    """A board with text of `kind`: word, words (two lines), letters (unpronounceable), number, sum or french."""

    def draw_sign() -> Sign:
        colour = rng.choice(sorted(COLOURS))
        if kind in ("word", "words"):
            lines = tuple(word(rng, split) for _ in range(1 if kind == "word" else 2))
        elif kind == "letters":
            lines = ("".join(rng.choice(_CONSONANTS) for _ in range(rng.randint(3, 4))),)
        elif kind == "number":
            lines = (str(rng.randint(10, 9999)),)
        elif kind == "sum":
            lines = (f"{rng.randint(1, 9)}+{rng.randint(1, 9)}=",)
        else:
            lines = (rng.choice(sorted(FRENCH)),)
        return Sign(kind, lines, colour)

    return of_split(split, draw_sign, lambda drawn: drawn.facts)


def form(rng: random.Random, split: Split, rows: int | None = None) -> Form:
    """A page of `rows` keys with values (3 to 7; a random number for None)."""
    keys = rng.sample(KEYS, rows or rng.randint(3, 7))

    def value(key: str) -> str:
        if key in ("NAME", "CITY", "ITEM", "SHIP"):
            return word(rng, split, 3, 4)

        def draw_value() -> str:
            if key == "DATE":
                return f"{rng.randint(1, 28):02d}/{rng.randint(1, 12):02d}"
            if key == "COST":
                return f"${rng.randint(10, 99)}"
            return (rng.choice(_CONSONANTS) if key == "CODE" else str(rng.randint(1, 9))) + f"{rng.randint(0, 99):02d}"

        return of_split(split, draw_value, lambda text: (f"{key} {text}",))

    return Form(tuple((key, value(key)) for key in keys))


def number_table(rng: random.Random, split: Split) -> NumberTable:
    """A table of two to four lines."""

    def row(label: str) -> tuple[str, tuple[int, int]]:
        numbers = lambda: (label, (rng.randint(10, 99), rng.randint(10, 99)))  # noqa: E731
        return of_split(split, numbers, lambda drawn: (f"{drawn[0]} {drawn[1][0]} {drawn[1][1]}",))

    return NumberTable(tuple(row(label) for label in rng.sample(LABELS, rng.randint(2, 4))))


def chart(rng: random.Random, split: Split) -> Chart:
    """A chart of three or four bars."""
    tall = rng.random() < 0.5
    # A wide picture has room for three columns of letters.
    labels = rng.sample([label for label in LABELS if tall or len(label) == 3], rng.randint(3, 4) if tall else 3)

    def bar(label: str) -> tuple[str, int]:
        return of_split(split, lambda: (label, rng.randint(10, 99)), lambda drawn: (f"{drawn[0]} {drawn[1]}",))

    return Chart(tuple(bar(label) for label in labels), tall)
