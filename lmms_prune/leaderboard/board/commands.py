"""The commands ``lmms-prune pack`` and ``merge``. They import heavy modules only when they run."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer

from lmms_prune.record.redaction import redacted
from lmms_prune.terminal.console import SECRETS, fail, plainly
from lmms_prune.terminal.progress import Progress


def pack(
    paths: Annotated[list[Path], typer.Argument(help="lmms-eval's result folders or files.")],
    out: Annotated[Path, typer.Option(help="Folder of the board.")],
    submitter: Annotated[str, typer.Option(help="Who submits the rows: a person or a group.")],
) -> None:
    """Write each row as one file, to share it.

    It has answers, token accounting, kept tokens and hashes, in about a tenth of the folder's size. The rows of a board
    share their documents, which are one file beside them. leaderboard, gate and verify read packs, and folders of
    packs, as they read folders of results.

    Example: lmms-prune pack results/ --out board/ --submitter "Group A"
    """
    from lmms_prune.leaderboard.board.rows import packed_rows
    from lmms_prune.leaderboard.results import read_results
    from lmms_prune.record.packs import PackError

    if not submitter.strip():
        fail("--submitter '': name who submits the rows.")
    if out.exists() and not out.is_dir():
        fail(f"--out {out}: this is a file; name a folder.")
    results = read_results(paths)
    for problem in results.problems:
        typer.echo(f"lmms-prune: {problem}", err=True)
    # A board must not have a part of what was submitted.
    if results.problems or not results.records:
        fail("pack: nothing was packed. Remove what cannot be read, or name other folders.")
    day = datetime.now(timezone.utc).date().isoformat()
    with plainly(PackError), Progress("rows") as progress:
        packs = list(packed_rows(results.records, out, submitter.strip(), day, SECRETS.get(), progress.count))
    for path in packs:
        typer.echo(redacted(f"{path} ({path.stat().st_size:,} bytes)", SECRETS.get()))
    if results.ignored:
        typer.echo(
            f"lmms-prune: left out, without one score a document: {', '.join(sorted(results.ignored))}.", err=True
        )


def merge(
    paths: Annotated[list[Path], typer.Argument(help="Boards: folders of packs, or packs.")],
    out: Annotated[Path, typer.Option(help="Folder of the merged board.")],
) -> None:
    """Merge the packs of several groups into one board.

    A list says who packed which row, and when. A pack that was cut or altered is refused by name, and so are boards
    with other documents.

    Example: lmms-prune merge group-a/ group-b/ --out board/
    """
    from lmms_prune.leaderboard.board.merging import INDEX, MergeError, merged
    from lmms_prune.record.packs import PackError

    if out.exists() and not out.is_dir():
        fail(f"--out {out}: this is a file; name a folder.")
    with plainly(MergeError, PackError):
        rows = merged(paths, out)
    for row in rows:
        typer.echo(redacted(f"{row.packed}  {row.submitter}: {row.model}, {row.schedule}", SECRETS.get()))
    typer.echo(f"{len(rows)} rows in {out}; {INDEX} lists them. Next: lmms-prune verify {out}")
