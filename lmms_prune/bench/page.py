"""The suite's results as one self-contained HTML page, without a script, in the style of the leaderboard's."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lmms_prune.bench.sections import sections
from lmms_prune.leaderboard import page as leaderboard_page

_FOLDER = Path(__file__).parent
_SHARED = Path(leaderboard_page.__file__).parent
_STYLES = (_SHARED / "page.css", _SHARED / "document.css", _FOLDER / "page.css")


def html(content: Mapping[str, Any]) -> str:
    """Render the suite's JSON as a page."""
    style = "\n".join(path.read_text(encoding="utf-8") for path in _STYLES)
    environment = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined)
    digest = b64encode(sha256(style.encode()).digest()).decode("ascii")
    tables = sections(content)
    return environment.get_template("page.html").render(
        facts=content["facts"],
        small=content["small"],
        parts=content["parts"],
        dates=sorted(part["date"][:10] for part in content["parts"].values() if part["date"]),
        unfinished={name: part for name, part in content["parts"].items() if part["state"] != "done"},
        sections=[(section, plot(section.bars)) for section in tables],
        style=style,
        style_hash=f"sha256-{digest}",
    )


def plot(bars: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the bars of a plot by their group, with positions in percent of the common scale."""
    longest = max((max(bar["ideal"], bar["realised"], bar["high"]) for bar in bars), default=1.0)
    # One very wide interval must not press all bars to the left: it runs out of the plot.
    scale = min(longest, 2 * max((max(bar["ideal"], bar["realised"]) for bar in bars), default=1.0)) * 1.02

    def percent(value: float) -> float:
        return round(100 * min(max(value, 0.0), scale) / scale, 2)

    ends = ("ideal", "realised", "low", "high")
    placed = [{**bar, "at": {end: percent(bar[end]) for end in ends}, "one": percent(1.0)} for bar in bars]
    return [(group, list(members)) for group, members in groupby(placed, key=lambda bar: bar["group"])]
