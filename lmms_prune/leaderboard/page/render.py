"""The page itself: the data, the script and the style in one file that needs nothing else."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Collection
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lmms_prune.leaderboard.page import changes, data
from lmms_prune.leaderboard.page.pictures import pictures
from lmms_prune.leaderboard.rows import Leaderboard
from lmms_prune.leaderboard.sharing import shared
from lmms_prune.record.redaction import redacted_values

_FOLDER = Path(__file__).parent


def html(board: Leaderboard, with_details: bool = True, secrets: Collection[str] = (), *, images: bool = False) -> str:
    """The page.

    Args:
        board: the table, with the paths of its samples.
        with_details: means nothing here: a page has every benchmark's statistics.
        secrets: values that the page may not hold, beside what is known by its form.
        images: read the benchmarks' data again, for the images behind changed answers. Needs the data as an evaluation
            does, and imports torch, which nothing else here does.

    Raises:
        PicturesError: the data cannot be read.
    """
    chosen, many = changes.changes(board)
    urls, pictured = pictures([one.wanted for one in chosen]) if images else ([], None)
    said: dict[str, Any] = data.described(shared(board))
    for model, rows in zip(said["models"], many, strict=True):
        for row, flips in zip(model["rows"], rows, strict=True):
            row["flips"] = flips
    said |= {"changes": changes.described(chosen, pictured)}
    said = {**redacted_values(said, secrets), "images": urls}
    environment = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined)
    # `tojson` writes <, > and & as \u00..: nothing in the data can end the script element.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
    script, style = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    return environment.get_template("page.html").render(
        data=said, script=script, style=style, script_hash=_hash(script), style_hash=_hash(style)
    )


def _hash(text: str) -> str:
    """As a content security policy names the one script, or style, that may run."""
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode('ascii')}"
