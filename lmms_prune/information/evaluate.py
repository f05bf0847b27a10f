"""Evaluations from Python: lmms-eval in a process of its own, as `lmms-prune sweep` runs it, and the rows of the leaderboard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmms_prune.errors import FROM_ONE, PATH, TEXT, TEXTS, Kind, expect, optional, several
from lmms_prune.harness.argument_text import argument_text
from lmms_prune.harness.installation import refuse_broken
from lmms_prune.harness.models import as_lmms_eval
from lmms_prune.harness.plugin import environment_secrets
from lmms_prune.information.layer_sweep import Evaluation, run_all, slug
from lmms_prune.leaderboard.frame import frame, warn_of_problems
from lmms_prune.leaderboard.options import samples_reader
from lmms_prune.leaderboard.reading import read_board
from lmms_prune.leaderboard.rows import Leaderboard, TableRow
from lmms_prune.leaderboard.table import RESAMPLES
from lmms_prune.schedule import Schedule
from lmms_prune.sweep.run import JobOutcome

if TYPE_CHECKING:
    import pandas as pd


def evaluate(
    schedules: Schedule | str | Sequence[Schedule | str],
    tasks: str | Sequence[str],
    out: str | PathLike[str],
    *,
    model: str | None = None,
    wrapper: str | None = None,
    model_args: str | Mapping[str, Any] = "",
    limit: int | None = None,
    include_path: str | PathLike[str] | None = None,
    launch: str = "",
    report: Callable[[JobOutcome], None] | None = None,
) -> pd.DataFrame:
    """Evaluate schedules of one model with lmms-eval, and return their rows of the leaderboard.

    lmms-eval runs in a process of its own, with the tasks' own YAMLs; its log is in `out`. Weights are loaded once. What is
    complete in `out` for the same settings, versions and code is not evaluated again, and an interrupted evaluation resumes.

    Args:
        schedules: one or several, as texts or `Schedule` objects; a text may end with ``,budget=…``. With ``none`` among them,
            now or earlier in `out`, the others are compared with the unpruned run.
        tasks: tasks of lmms-eval, separated by commas or in a list.
        out: a folder for the results of one model. Its `runs` is what `leaderboard` and ``lmms-prune leaderboard`` read.
        model: a checkpoint's folder or hub name; by default that of the wrapper.
        wrapper: lmms-eval's name of a model of this package; by default the one that loads the checkpoint.
        model_args: further arguments as for lmms-eval, without checkpoint, schedule and budget: ``dtype=…,prompt=…``, JSON, or
            a mapping.
        limit: only the first documents of each task.
        include_path: a folder of further task YAMLs.
        launch: the launcher of the evaluating processes: ``torchrun --nproc_per_node 2``.
        report: is called with the outcome of each schedule on each task.

    Returns:
        one row per schedule, with the columns of `leaderboard`.

    Raises:
        TypeError, ValueError: an argument of another type, or an empty one; names it.
        ScheduleError: a schedule that is wrong.
        ArgumentError, ConfigError, SweepError: other arguments that are wrong, before anything runs.
        InstallationError: an installation in which no run can succeed.
        InformationError: an evaluation failed; gives the reason from its log, and where the log is.

    Warns:
        LeaderboardWarning: as `leaderboard`.
    """
    listed = several(schedules, (str, Schedule))
    names = tasks.split(",") if isinstance(tasks, str) else several(tasks, str)
    expect(
        schedules=(listed, Kind("at least one schedule", lambda value: True, lambda value: len(value) > 0)),
        tasks=(names, Kind("names of tasks, at least one", TEXTS.holds, lambda value: len(value) > 0 and all(value))),
        out=(out, PATH),
        limit=(limit, optional(FROM_ONE)),
        include_path=(include_path, optional(PATH)),
        launch=(launch, TEXT),
    )
    texts = list(dict.fromkeys(map(_text, listed)))
    arguments = argument_text(model_args)
    include = None if include_path is None else Path(include_path)
    refuse_broken()
    secrets = environment_secrets()
    evaluation = Evaluation(*as_lmms_eval(model, wrapper, arguments), names, limit, include=include, secrets=secrets)
    folder = Path(out).absolute()
    run_all(evaluation, texts, folder, launch, report or (lambda outcome: None))
    board, _ = read_board([folder / "runs"], None, None, None, RESAMPLES, 0, samples_reader(True))
    warn_of_problems(board)
    return frame(_only(board, [folder / "runs" / slug(text) for text in texts]))


def _text(schedule: Schedule | str) -> str:
    """The text for a process that may start in another folder."""
    parsed, budget = Schedule.with_budget(schedule)
    return str(parsed.absolute) + ("" if budget is None else f",budget={budget}")


def _only(board: Leaderboard, folders: Sequence[Path]) -> Leaderboard:
    """The leaderboard with the rows of runs below `folders` alone; they stay compared with all others."""

    def is_below(row: TableRow) -> bool:
        paths = [source.path.absolute() for run in row.runs for source in run.sources]
        return any(path.is_relative_to(folder) for path in paths for folder in folders)

    models = [
        replace(
            model,
            budgets=tuple(replace(group, rows=tuple(filter(is_below, group.rows))) for group in model.budgets),
        )
        for model in board.models
    ]
    return replace(board, models=tuple(models))
