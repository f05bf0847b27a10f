"""What a demo picture can show, drawn by chance, and which of it is held out from training."""

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
        """What makes it this scene: all its shapes together, wherever they stand."""
        return (" and ".join(sorted(f"{'large' if thing.large else 'small'} {thing}" for thing in self.things)),)


@dataclass(frozen=True)
class Sign:
    """A coloured board with one or two lines; `kind` is word, words, letters, number, sum or french."""

    kind: str
    lines: tuple[str, ...]
    colour: str

    @property
    def facts(self) -> tuple[str, ...]:
        """The lines, with the board's colour where there are few such lines."""
        few = self.kind in ("sum", "french")
        return tuple(f"{line} on {self.colour}" if few else line for line in self.lines)


@dataclass(frozen=True)
class Form:
    """A page of lines, each a key and its value."""

    fields: tuple[tuple[str, str], ...]

    @property
    def facts(self) -> tuple[str, ...]:
        """The values; words are held out wherever they stand, numbers with their key."""
        return tuple(value if value.isalpha() else f"{key} {value}" for key, value in self.fields)


@dataclass(frozen=True)
class Grid:
    """A small table: a line for each label with a number (10 to 99) below each of HEADS."""

    rows: tuple[tuple[str, tuple[int, int]], ...]

    @property
    def facts(self) -> tuple[str, ...]:
        """Each label with its numbers."""
        return tuple(f"{label} {one} {two}" for label, (one, two) in self.rows)


@dataclass(frozen=True)
class Chart:
    """Bars with a label and a number (10 to 99), one below the other if `tall`, else side by side."""

    bars: tuple[tuple[str, int], ...]
    tall: bool

    @property
    def facts(self) -> tuple[str, ...]:
        """Each bar's label with its number."""
        return tuple(f"{label} {value}" for label, value in self.bars)


Content = Scene | Sign | Form | Grid | Chart
_T = TypeVar("_T")


def held_out(fact: str) -> bool:
    """Whether `fact` is kept from training: one in eight, decided by its text alone."""
    return hashlib.sha256(fact.encode()).digest()[0] < 32


def of_split(split: Split, draw: Callable[[], _T], facts: Callable[[_T], tuple[str, ...]]) -> _T:
    """Draw until all facts belong to `split`: a test picture has held-out facts only, a training picture none."""
    while True:
        drawn = draw()
        if all(held_out(fact) == (split == "test") for fact in facts(drawn)):
            return drawn


def word(rng: random.Random, split: Split, least: int = 3, most: int = 5) -> str:
    """A pronounceable word of `least` to `most` capital letters that is no word of the demo's own."""

    def one() -> str:
        length, starts = rng.randint(least, most), rng.randrange(2)
        return "".join(rng.choice(_VOWELS if (place + starts) % 2 else _CONSONANTS) for place in range(length))

    while (made := of_split(split, one, lambda text: (text,))) in (*KEYS, *LABELS, *FRENCH):
        pass
    return made


def scene(rng: random.Random, split: Split, count: int | None = None) -> Scene:
    """`count` shapes (1 to 4; drawn if not given)."""

    def one() -> Scene:
        many = count or rng.randint(1, 4)
        cells = rng.sample([(column, row) for column in range(3) for row in range(3)], many)
        named = zip(rng.sample(KINDS, many), rng.sample(sorted(COLOURS), many), cells, strict=True)
        return Scene(tuple(Thing(kind, colour, rng.random() < 0.5, *cell) for kind, colour, cell in named))

    return of_split(split, one, lambda made: made.facts)


def sign(rng: random.Random, split: Split, kind: str) -> Sign:
    """A board with text of `kind`: word, words (two lines), letters (unpronounceable), number, sum or french."""

    def one() -> Sign:
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

    return of_split(split, one, lambda made: made.facts)


def form(rng: random.Random, split: Split, rows: int | None = None) -> Form:
    """A page of `rows` keys with values (3 to 7; drawn if not given)."""
    keys = rng.sample(KEYS, rows or rng.randint(3, 7))

    def value(key: str) -> str:
        if key in ("NAME", "CITY", "ITEM", "SHIP"):
            return word(rng, split, 3, 4)

        def one() -> str:
            if key == "DATE":
                return f"{rng.randint(1, 28):02d}/{rng.randint(1, 12):02d}"
            if key == "COST":
                return f"${rng.randint(10, 99)}"
            return (rng.choice(_CONSONANTS) if key == "CODE" else str(rng.randint(1, 9))) + f"{rng.randint(0, 99):02d}"

        return of_split(split, one, lambda text: (f"{key} {text}",))

    return Form(tuple((key, value(key)) for key in keys))


def grid(rng: random.Random, split: Split) -> Grid:
    """A table of two to four lines."""

    def row(label: str) -> tuple[str, tuple[int, int]]:
        numbers = lambda: (label, (rng.randint(10, 99), rng.randint(10, 99)))  # noqa: E731
        return of_split(split, numbers, lambda made: (f"{made[0]} {made[1][0]} {made[1][1]}",))

    return Grid(tuple(row(label) for label in rng.sample(LABELS, rng.randint(2, 4))))


def chart(rng: random.Random, split: Split) -> Chart:
    """Three or four bars."""
    tall = rng.random() < 0.5
    # A wide picture has room for three columns of letters.
    labels = rng.sample([label for label in LABELS if tall or len(label) == 3], rng.randint(3, 4) if tall else 3)

    def bar(label: str) -> tuple[str, int]:
        return of_split(split, lambda: (label, rng.randint(10, 99)), lambda made: (f"{made[0]} {made[1]}",))

    return Chart(tuple(bar(label) for label in labels), tall)
