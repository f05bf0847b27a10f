"""The HTML page: data, script and style in one self-contained file."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lmms_prune.leaderboard.page import changes, data
from lmms_prune.leaderboard.page.pictures import pictures
from lmms_prune.leaderboard.reader import SamplesReader
from lmms_prune.leaderboard.rows import Leaderboard
from lmms_prune.leaderboard.sharing import names, shared
from lmms_prune.record.redaction import redacted_values

_FOLDER = Path(__file__).parent
TITLE = "Visual-token pruning"
# One script, in this order: what is written first is used by what follows.
_SCRIPTS = ("basics", "links", "saves", "sortable", "table", "tradeoff", "benchmark", "changes", "row", "frame")


@dataclass(frozen=True)
class Submitter:
    """Who submitted the results of a folder; without a folder all results."""

    name: str
    folder: Path | None = None


def html(
    board: Leaderboard,
    with_details: bool = True,
    secrets: Collection[str] = (),
    *,
    images: bool = False,
    include: Path | None = None,
    reader: SamplesReader | None = None,
    title: str = TITLE,
    submitters: Sequence[Submitter] = (),
) -> str:
    """Render the leaderboard as a page.

    Args:
        board: the leaderboard, with the paths of its samples.
        with_details: ignored; a page always has every benchmark's statistics.
        secrets: values to redact, in addition to secrets recognised by their form.
        images: read the benchmarks' data again, to show the images behind changed answers. Needs the data as in an
            evaluation, and imports torch, unlike the rest of this module.
        include: with `images`, a folder of further task YAMLs beside this package's own.
        reader: what has read the samples for the leaderboard; by default they are read again.
        title: the page's title.
        submitters: who submitted which results; of several that fit a result, the deepest folder counts.

    Raises:
        PicturesError: the data cannot be read.
        ChangedError: a samples file has changed since the leaderboard was made.
    """
    chosen, counts = changes.changes(board, reader or SamplesReader())
    urls, pictured = pictures([change.wanted for change in chosen], include) if images else ([], None)
    page_data: dict[str, Any] = data.described(shared(board), title, _submitted(board, submitters))
    for model, rows in zip(page_data["models"], counts, strict=True):
        for row, flips in zip(model["rows"], rows, strict=True):
            row["flips"] = flips
    page_data |= {"changes": changes.described(chosen, pictured)}
    page_data = {**redacted_values(page_data, secrets), "images": urls}
    environment = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined)
    # `tojson` escapes <, > and & as \u00.., so that no data can end the script element.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
    script = "\n".join((_FOLDER / "script" / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        title=page_data["title"],
        data=page_data,
        script=script,
        style=style,
        script_hash=_hash(script),
        style_hash=_hash(style),
    )


def _submitted(board: Leaderboard, submitters: Sequence[Submitter]) -> dict[Path, str]:
    """Return the submitter of each results file, by its path as the page's data have it; a pack names its own."""
    renamed = names(board)
    by_path = {}
    deepest_last = sorted(
        submitters, key=lambda submitter: -1 if submitter.folder is None else len(submitter.folder.absolute().parts)
    )
    for model in board.models:
        packers = {source.path: source.submitter for row in model.rows for run in row.runs for source in run.sources}
        for path, packer in packers.items():
            if packer:
                by_path[renamed.shared(path)] = packer
                continue
            for submitter in deepest_last:
                if submitter.folder is None or path.resolve().is_relative_to(submitter.folder.resolve()):
                    by_path[renamed.shared(path)] = submitter.name
    return by_path


def _hash(text: str) -> str:
    """Return the hash by which a content security policy allows one script or style."""
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode('ascii')}"
