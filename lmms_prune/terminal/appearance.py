"""One colour and one marker for each method and for each series, in every figure and on the leaderboard's page.

The colours can be told apart with each of the three kinds of colour blindness, and the markers where there are no colours.
The table imports nothing, so that the page has it without matplotlib. Kinds of methods have markers of their own: circles
and triangles score importance, squares are diverse, diamonds are hybrids, pentagons merge, the rest are controls.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any
from zlib import crc32

# After Okabe and Ito (2008), without their yellow, which is too light for a line; orange and sky blue are darker here.
COLOURS: dict[str, str] = {
    "blue": "#0072b2",
    "vermilion": "#d55e00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "sky": "#45a5de",
    "orange": "#dc9600",
    "grey": "#666666",  # on the page the grey of its side notes
    "ink": "#000000",  # on the page the colour of its text
}
# matplotlib's letter of each marker, and its outline in a square from -1 to 1 for SVG.
MARKERS: dict[str, tuple[str, str]] = {
    "circle": ("o", "M-.9 0a.9 .9 0 1 0 1.8 0a.9 .9 0 1 0 -1.8 0z"),
    "square": ("s", "M-.8 -.8h1.6v1.6h-1.6z"),
    "diamond": ("D", "M0 -1.1L1.1 0L0 1.1L-1.1 0z"),
    "up": ("^", "M0 -1L1 .8H-1z"),
    "down": ("v", "M0 1L1 -.8H-1z"),
    "left": ("<", "M-1 0L.8 -1V1z"),
    "right": (">", "M1 0L-.8 -1V1z"),
    "pentagon": ("p", "M0 -1L.95 -.31L.59 .81H-.59L-.95 -.31z"),
    "hexagon": ("h", "M0 -1L.87 -.5V.5L0 1L-.87 .5V-.5z"),
    "plus": ("P", "M-.35 -1H.35V-.35H1V.35H.35V1H-.35V.35H-1V-.35H-.35z"),
    "cross": ("X", "M-1 -.5L-.5 -1L0 -.5L.5 -1L1 -.5L.5 0L1 .5L.5 1L0 .5L-.5 1L-1 .5L-.5 0z"),
    "star": ("*", "M0 -1.1L.29 -.4L1.05 -.34L.47 .15L.65 .89L0 .49L-.65 .89L-.47 .15L-1.05 -.34L-.29 -.4z"),
}


@dataclass(frozen=True)
class Appearance:
    """A colour and a marker: names of `COLOURS` and `MARKERS`."""

    colour: str
    marker: str

    @property
    def line(self) -> dict[str, Any]:
        """The keywords of matplotlib's `plot`."""
        return {"color": COLOURS[self.colour], "marker": MARKERS[self.marker][0]}


METHOD_APPEARANCE: dict[str, Appearance] = {
    "none": Appearance("ink", "square"),
    "fastv": Appearance("vermilion", "circle"),
    "pdrop": Appearance("sky", "circle"),
    "sgl": Appearance("orange", "circle"),
    "fastervlm": Appearance("green", "circle"),
    "fitprune": Appearance("blue", "circle"),
    "swiftvlm": Appearance("purple", "circle"),
    "hiprune": Appearance("vermilion", "up"),
    "hivtp": Appearance("sky", "up"),
    "sparsevlm": Appearance("purple", "up"),
    "glimpseprune": Appearance("orange", "up"),
    "dart": Appearance("blue", "square"),
    "divprune": Appearance("green", "square"),
    "todre": Appearance("orange", "square"),
    "nuwa": Appearance("blue", "diamond"),
    "vscan": Appearance("vermilion", "diamond"),
    "vispruner": Appearance("green", "diamond"),
    "scope": Appearance("purple", "diamond"),
    "holov": Appearance("sky", "diamond"),
    "mustdrop": Appearance("orange", "diamond"),
    "ivcprune": Appearance("blue", "down"),
    "cdpruner": Appearance("vermilion", "down"),
    "visionzip": Appearance("blue", "pentagon"),
    "prumerge": Appearance("vermilion", "pentagon"),
    "tome": Appearance("green", "pentagon"),
    "folder": Appearance("purple", "pentagon"),
    "vflowopt": Appearance("orange", "pentagon"),
    "random": Appearance("ink", "cross"),
    "vtw": Appearance("grey", "plus"),
    "blind": Appearance("ink", "plus"),
    "stride": Appearance("grey", "cross"),
    "keepfirst": Appearance("grey", "left"),
    "keeplast": Appearance("grey", "right"),
    "pool": Appearance("grey", "hexagon"),
    "downsample": Appearance("ink", "hexagon"),
    "information": Appearance("ink", "star"),
}
_TAKEN = set(METHOD_APPEARANCE.values())
_FREE = [look for look in (Appearance(*pair) for pair in product(COLOURS, MARKERS)) if look not in _TAKEN]
_SERIES = ("circle", "square", "up", "diamond", "down", "pentagon", "plus", "cross")


def of_method(name: str) -> Appearance:
    """The appearance of a method, with or without options (``sgl;guide=x``).

    A method that is not in the table (one of the user's own) has one that no built-in method has, and always the same.
    """
    name = name.partition(";")[0]
    return METHOD_APPEARANCE.get(name) or _FREE[crc32(name.encode()) % len(_FREE)]


def of_series(index: int) -> Appearance:
    """The appearance of the series number `index` of what is no method, such as benchmarks; the first 56 differ."""
    colours = [colour for colour in COLOURS if colour != "ink"]
    round_number, colour = divmod(index, len(colours))
    # The marker changes with the colour and moves on each round, so that no pair repeats before all are used.
    return Appearance(colours[colour], _SERIES[(colour + round_number) % len(_SERIES)])
