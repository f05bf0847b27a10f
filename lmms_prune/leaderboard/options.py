"""Options that the commands on results share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lmms_prune.leaderboard.reader import SamplesReader

KeepPaths = Annotated[
    bool, typer.Option("--keep-paths", help="Print full paths, not names relative to the results folders.")
]
UseCache = Annotated[
    bool,
    typer.Option(
        "--cache/--no-cache",
        help="Keep what was read of samples files in the user's cache folder (on Linux ~/.cache/lmms-prune), so that "
        "files which have not changed are not read again.",
    ),
]
Data = Annotated[
    bool,
    typer.Option(
        "--data",
        help="Verify by the benchmarks' data too: questions, references, and scores that need them. Start it "
        "where an evaluation finds the data.",
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        help="Verify the numbers first, as `lmms-prune verify` does; --no-verify is for results that were measured here.",
    ),
]


def samples_reader(cached: bool) -> SamplesReader:
    """Return the reader of samples files, with the user's cache or without."""
    from lmms_prune.leaderboard.cache import Cache, cache_folder
    from lmms_prune.leaderboard.reader import SamplesReader, processors

    folder = cache_folder() if cached else None
    return SamplesReader(None if folder is None else Cache(folder), processors())
