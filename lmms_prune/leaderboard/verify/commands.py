"""The command ``lmms-prune verify``. It imports heavy modules only when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lmms_prune.leaderboard.options import Data, KeepPaths, UseCache, samples_reader
from lmms_prune.record.redaction import redacted
from lmms_prune.terminal.console import SECRETS, plainly
from lmms_prune.terminal.options import Include, Json
from lmms_prune.terminal.progress import Progress


def verify(
    paths: Annotated[list[Path], typer.Argument(help="Result folders, packs, or folders of packs.")],
    data: Data = False,
    include_path: Include = None,
    keep_paths: KeepPaths = False,
    cache: UseCache = True,
    as_json: Json = False,
) -> None:
    """Derive every recorded number again from others.

    Rows that contradict themselves or each other are refused. Token accounting, plans, averages, KV bytes, FLOPs,
    scores and the tokens of controls are computed again on a CPU; rows are compared with each other. What cannot be
    verified is listed. The exit code is 1 if a row is refused or unreadable.

    Example: lmms-prune verify results/ --data
    """
    from lmms_prune.harness.arguments import ArgumentError
    from lmms_prune.leaderboard.results import read_results
    from lmms_prune.leaderboard.sharing import PathNames
    from lmms_prune.leaderboard.verify import report
    from lmms_prune.leaderboard.verify.rescoring import Rescoring
    from lmms_prune.leaderboard.verify.verdicts import verification

    results = read_results(paths)
    with plainly(ArgumentError), Progress("rows") as progress:
        rescoring = Rescoring(data, include_path)
        verified = verification(results.records, results.problems, samples_reader(cache), rescoring, progress.count)
    names = PathNames(paths, list(dict.fromkeys(run.model for run in results.records)), keep_paths)
    if as_json:
        typer.echo(redacted(json.dumps(report.as_json(verified, names)), SECRETS.get()))
    else:
        typer.echo(redacted(report.as_text(verified, names), SECRETS.get()), nl=False)
    for problem in verified.problems:
        typer.echo(f"lmms-prune: {problem}", err=True)
    if results.ignored:
        typer.echo(
            f"lmms-prune: not verified, without one score a document: {', '.join(sorted(results.ignored))}.", err=True
        )
    if not verified.passed:
        raise typer.Exit(1)
