"""The leaderboard in Python: one row per schedule, as a DataFrame."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import takewhile
from os import PathLike
from pathlib import Path
from traceback import extract_stack
from typing import TYPE_CHECKING

from lmms_prune.errors import FLAG, FROM_ONE, FROM_ZERO, PATH, PATHS, TEXT, expect, optional, several
from lmms_prune.harness.plugin import environment_secrets
from lmms_prune.leaderboard.formats import csv_rows
from lmms_prune.leaderboard.options import samples_reader
from lmms_prune.leaderboard.reading import LeaderboardError, read_board
from lmms_prune.leaderboard.rows import Leaderboard
from lmms_prune.leaderboard.sharing import shared
from lmms_prune.leaderboard.table import RESAMPLES
from lmms_prune.record.redaction import redacted_values

if TYPE_CHECKING:
    import pandas as pd

_PACKAGE = Path(__file__).parents[1]
Paths = str | PathLike[str] | Sequence[str | PathLike[str]]


class LeaderboardWarning(UserWarning):
    """Results that could not be used, or a model without a baseline; the other rows are as they would be without them."""


def leaderboard(
    paths: Paths,
    *,
    baseline: str | PathLike[str] | None = None,
    benchmarks: str | None = None,
    count: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    cache: bool = True,
) -> pd.DataFrame:
    """Compare runs of lmms-eval: the rows of ``lmms-prune leaderboard PATHS --format csv``.

    Every row is compared with the unpruned run of the same checkpoint. Scores and Rel are in percent (MME: points), tokens,
    MiB and TFLOPs per document.

    Args:
        paths: result folders or files of lmms-eval, one or several.
        baseline: results to compare with, instead of the unpruned runs among `paths`.
        benchmarks: only these columns, separated by commas: ``POPE,TextVQA``.
        count: tasks that count in ``acc`` and ``rel`` beside the paper's ten benchmarks, separated by commas, or ``all``.
        resamples, seed: of the resampling behind every interval; the same seed gives the same intervals.
        cache: keep what was read of samples files in the user's cache folder.

    Returns:
        one row per schedule and checkpoint, best first within a budget. Columns (docs/leaderboard.md): ``model``, ``budget``,
        ``schedule``, ``kind``, measured costs, ``acc``, ``rel`` with its interval, and each task's score and comparison.

    Raises:
        TypeError, ValueError: an argument of another type, or an empty one; names it.
        LeaderboardError: there are no results, an unknown benchmark, or a task that cannot count.

    Warns:
        LeaderboardWarning: a file that cannot be read, or a model without a baseline.
    """
    listed = several(paths, (str, PathLike))
    expect(
        paths=(listed, PATHS),
        baseline=(baseline, optional(PATH)),
        benchmarks=(benchmarks, optional(TEXT)),
        count=(count, optional(TEXT)),
        resamples=(resamples, FROM_ONE),
        seed=(seed, FROM_ZERO),
        cache=(cache, FLAG),
    )
    folders = [Path(path) for path in listed]
    compared = None if baseline is None else Path(baseline)
    board, _ = read_board(folders, compared, benchmarks, count, resamples, seed, samples_reader(cache))
    warn_of_problems(board)
    if not board.models:
        names = ", ".join(map(str, folders))
        raise LeaderboardError(f"leaderboard: no results of lmms-eval in {names}; name the folder after --output_path.")
    return frame(board)


def warn_of_problems(board: Leaderboard) -> None:
    """Warn of what could not be read or compared, in the code outside of this package that asked for it."""
    calls = reversed(extract_stack())
    inside = sum(1 for _ in takewhile(lambda call: Path(call.filename).is_relative_to(_PACKAGE), calls))
    for problem in board.problems:
        warnings.warn(str(problem), LeaderboardWarning, stacklevel=inside + 1)


def frame(board: Leaderboard) -> pd.DataFrame:
    """A finished leaderboard as a DataFrame, without paths of this machine and without secrets."""
    import pandas as pd

    return pd.DataFrame(redacted_values(csv_rows(shared(board)), environment_secrets()))
