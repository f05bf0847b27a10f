"""From result folders to a finished leaderboard: what the commands and the Python function share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmms_prune.leaderboard.benchmarks import BENCHMARKS, FURTHER, TASKS, named
from lmms_prune.leaderboard.reader import SamplesReader
from lmms_prune.leaderboard.results import Results, read_results
from lmms_prune.leaderboard.rows import Leaderboard
from lmms_prune.leaderboard.table import leaderboard


class LeaderboardError(ValueError):
    """A leaderboard that cannot be made as it is asked for; the message names the option, its value and what is allowed."""


def read_board(
    paths: Sequence[Path],
    baseline: Path | None,
    benchmarks: str | None,
    count: str | None,
    resamples: int,
    seed: int,
    reader: SamplesReader,
) -> tuple[Leaderboard, list[Results]]:
    """Read results and build their leaderboard.

    Args:
        paths, baseline, benchmarks, count, resamples, seed: as the options of ``lmms-prune leaderboard``.
        reader: reads the samples.

    Returns:
        the leaderboard, and the results behind it: of `paths`, then of the baseline.

    Raises:
        LeaderboardError: an unknown benchmark, or a task that cannot count.
    """
    tasks = None
    if benchmarks is not None:
        tasks = [task for name in benchmarks.split(",") for task in tasks_of("--benchmarks", name, paths)]
    results, baseline_results = read_results(paths), None if baseline is None else read_results([baseline])
    present = {task: None for record in results.records for task in record.tasks}
    board = leaderboard(results, baseline_results, tasks, resamples, seed, reader, _counted(count, list(present)))
    return board, [results, *([] if baseline_results is None else [baseline_results])]


def tasks_of(option: str, name: str, paths: Sequence[Path]) -> tuple[str, ...]:
    """Return the tasks of a benchmark by its name. Tasks beside the known ones are read from the results below `paths`.

    Raises:
        LeaderboardError: it is unknown; names the option.
    """
    if not (tasks := named(name)):
        read_results(paths)
        tasks = named(name)
    if not tasks:
        names = [benchmark.name for benchmark in (*BENCHMARKS, *FURTHER)]
        raise LeaderboardError(f"{option} {name}: unknown benchmark. Use one of {', '.join(names)}, or a task's name.")
    return tasks


def _counted(count: str | None, present: Sequence[str]) -> list[str]:
    """Return the tasks that --count names: only those where more is better can be a share of the unpruned score."""
    if count is None:
        return []
    if count.strip() == "all":
        return [task for task in present if TASKS[task].higher_is_better]
    tasks = [task for name in count.split(",") for task in (named(name) or (name.strip(),))]
    if not (counted := [task for task in tasks if task in present]):
        raise LeaderboardError(
            f"--count {count}: no such task among the results. They have {', '.join(present) or 'no task'}."
        )
    if lower := [task for task in counted if not TASKS[task].higher_is_better]:
        raise LeaderboardError(
            f"--count {count}: lower is better in {', '.join(lower)}, so it is no share of the unpruned score; leave it out."
        )
    return counted
