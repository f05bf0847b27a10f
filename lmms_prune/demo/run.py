"""Runs the demo: real lmms-eval processes on local data, for both trained models."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lmms_prune.demo.benchmarks import TASKS, mirror_in
from lmms_prune.demo.models import MODELS, DemoCheckpoint, DemoError, model_arguments, sizes, weights
from lmms_prune.demo.processes import DemoRun, RunError, evaluate
from lmms_prune.demo.proposals import proposals
from lmms_prune.efficiency.estimate import prompt_sizes
from lmms_prune.harness.tasks import task_configs
from lmms_prune.leaderboard.benchmarks import TASKS as BENCHMARKS
from lmms_prune.leaderboard.benchmarks import rel, score
from lmms_prune.record.accounting import written
from lmms_prune.record.redaction import secret_values
from lmms_prune.record.run import RunReport
from lmms_prune.schedule import Schedule
from lmms_prune.schedule.budgets import Budget

ROWS, QUICK_ROWS = 96, 24  # questions of each benchmark
PAPER_DEPTH, CALIBRATED = "the paper's depth", "calibrated"


@dataclass(frozen=True)
class DemoRow:
    """One row of the demo's table.

    Args:
        schedule: the schedule.
        budget: solves its ``?``.
        role: PAPER_DEPTH or CALIBRATED for the rows that show why the horizon must be measured, else empty.
    """

    schedule: Schedule
    budget: Budget | None = None
    role: str = field(default="", compare=False)

    @classmethod
    def of(cls, text: str) -> DemoRow:
        """A row from its text, as in --model_args: a schedule, optionally followed by ",budget=…"."""
        return cls(*Schedule.with_budget(text))

    @classmethod
    def checked(cls, text: str) -> DemoRow:
        """`of`, for a text that a user wrote.

        Raises:
            ScheduleError: the schedule or its budget is invalid, or does not fit the models.
        """
        model = sizes()
        Schedule.parse(text, prompt_sizes(model)).check(model.layers)
        return cls.of(text)

    def __str__(self) -> str:
        return str(self.schedule) if self.budget is None else f"{self.schedule},budget={self.budget}"

    def for_model(self, model: DemoCheckpoint) -> DemoRow:
        """The row of one model: the same for all."""
        return self


@dataclass(frozen=True)
class ProposedRow:
    """The row of the schedule that `lmms-prune calibrate` proposes for a model: another one for each model."""

    def for_model(self, model: DemoCheckpoint) -> DemoRow:
        """The row of one model.

        Raises:
            DemoError: the stored proposals are missing or damaged.
        """
        return DemoRow(proposals()[model.folder].schedule, role=CALIBRATED)


AnyRow = DemoRow | ProposedRow


# The paper's hybrids act at the input of layers 2 and 20 of 32; scaled to 12 layers: 1 and 8.
_HYBRID = "dart@1:?,random@8:{late}"
# The same with DivPrune, and what `calibrate` proposes at the same budget.
_DEPTHS: tuple[AnyRow, ...] = (
    replace(DemoRow.of("divprune@1:?,random@8:0.03,budget=0.25"), role=PAPER_DEPTH),
    ProposedRow(),
)
QUICK: tuple[AnyRow, ...] = (
    DemoRow.of("none"),
    DemoRow.of("random@1:1"),
    DemoRow.of(f"{_HYBRID.format(late=0.1)},budget=0.5"),
    *_DEPTHS,
    DemoRow.of("blind@0"),
)
_SINGLE = ("dart@1:?", "divprune@1:?", "fastv@1:?", "random@1:?", "stride@1:?", "pool@1:?")
FULL: tuple[AnyRow, ...] = (
    DemoRow.of("none"),
    *(DemoRow.of(f"{text},budget=0.5") for text in (_HYBRID.format(late=0.1), "divprune@1:?,random@8:0.1", *_SINGLE)),
    *_DEPTHS,
    *(DemoRow.of(f"{text},budget=0.25") for text in (_HYBRID.format(late=0.03), *_SINGLE)),
    DemoRow.of("vtw@8"),
    DemoRow.of("blind@0"),
)


def task_names(text: str | None) -> list[str]:
    """The comma-separated tasks in `text`; all ten for None.

    Raises:
        DemoError: the demo does not have a task, or the text names none.
    """
    names = list(TASKS) if text is None else [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in TASKS]:
        raise DemoError(f"--tasks: '{unknown[0]}' is not in the demo; it has {', '.join(TASKS)}.")
    if not names:
        raise DemoError(f"--tasks: '{text}' names no task; the demo has {', '.join(TASKS)}.")
    return names


def run_demo(
    folder: Path,
    rows: Sequence[AnyRow],
    count: int,
    tasks: Sequence[str],
    environment: Mapping[str, str],
    console: Console,
) -> dict[str, Any]:
    """Build the data if it does not exist, evaluate both models with every schedule, and return the results.

    Args:
        folder: an absolute path. Existing data in it is reused, and results of earlier runs are kept.
        rows: the schedules.
        count: questions of each benchmark; even.
        tasks: some of `TASKS`.
        environment: the environment of the child processes.
        console: shows the progress.

    Returns:
        keys ``mirror`` (the folder to start lmms-eval in), ``command`` (the command line of a successful run, if possible
        of one with a budget), ``runs`` (model, schedule, role, solved, averages, scores) and ``failures`` (model, schedule,
        error).

    Raises:
        DemoError: a model is missing, data is damaged, or lmms-eval cannot use the folder's name.
        RunError: a run failed for a reason that all runs share.
        OSError: `folder` cannot be written.
    """
    if "," in str(folder):
        raise DemoError(f"--folder {folder}: lmms-eval cannot take a comma in a path; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = {model: weights(model) for model in MODELS}
    with console.status("drawing the ten benchmarks"):
        mirror = mirror_in(folder, count)
    pairs = [(model, row.for_model(model)) for model in MODELS for row in rows]
    results = folder / f"results-{count}"
    runs = [_run(model, checkpoints[model], row, tasks, results / model.folder) for model, row in pairs]
    one_thread = {**environment, "OMP_NUM_THREADS": "1"}
    with _progress(console, f"{len(runs)} runs of lmms-eval, {len(tasks)} tasks each", len(runs)) as progressed:
        outcomes = evaluate(runs, results, mirror, one_thread, secret_values(environment), progressed)
    record: dict[str, Any] = {"mirror": str(mirror), "runs": [], "failures": []}
    commands: list[tuple[bool, str]] = []
    for (model, row), run, outcome in zip(pairs, runs, outcomes, strict=True):
        if isinstance(outcome, RunError):
            record["failures"].append({"model": model.family.model_name, "schedule": str(row), "error": str(outcome)})
        else:
            record["runs"].append(_record(model, row, outcome, tasks))
            commands.append((row.budget is None, shlex.join(run.command)))
    # A command with a budget is the first hybrid's, which shows more of pruning than the unpruned model's.
    record["command"] = min(commands, key=itemgetter(0), default=(True, ""))[1]
    return record


def tables(record: Mapping[str, Any], names: Sequence[str]) -> list[Table]:
    """One table per model: a row per schedule, a column per benchmark, and the kept share of the unpruned scores."""
    model_tables = []
    for model in MODELS:
        runs = [run for run in record["runs"] if run["model"] == model.family.model_name]
        if not runs:
            continue
        table = Table(box=box.SIMPLE_HEAD, title=model.folder, padding=0, pad_edge=False)
        table.add_column("schedule", overflow="fold")
        for name in ("tokens", *(BENCHMARKS[name].narrow for name in names), "kept"):
            table.add_column(name, justify="right", no_wrap=True)
        unpruned = next((run for run in runs if run["schedule"] == "none"), None)
        for run in runs:
            scores = ["" if (value := run["scores"][name]) is None else f"{value:.0f}" for name in names]
            kept = rel(run["scores"], unpruned["scores"]) if unpruned else None
            label = "\n".join([*run["schedule"].split(","), *([f"({run['role']})"] if run["role"] else [])])
            tokens = f"{run['averages']['avg_visual_tokens']:.0f}"
            table.add_row(label, tokens, *scores, "" if kept is None else f"{kept:.0f}")
        table.caption, table.caption_justify, table.caption_style = _lesson(model, runs), "left", ""
        model_tables.append(table)
    return model_tables


def _lesson(model: DemoCheckpoint, runs: Sequence[Mapping[str, Any]]) -> str:
    """What the table shows about depth; empty without the unpruned run, or without one of the two rows."""
    roles = {run["role"]: run for run in runs}
    unpruned = next((run for run in runs if run["schedule"] == "none"), None)
    if unpruned is None or not {PAPER_DEPTH, CALIBRATED} <= set(roles):
        return ""
    paper, own = (rel(roles[role]["scores"], unpruned["scores"]) for role in (PAPER_DEPTH, CALIBRATED))
    if paper is None or own is None:
        return ""
    proposal = proposals()[model.folder]
    return (
        f"See: at budget {proposal.budget} a hybrid keeps {paper:.0f} % at the paper's depth, and {own:.0f} % as `calibrate` proposes it. "
        f"The horizon must be measured: random starts at layer {proposal.schedule.stages[-1].layer} here, not at 8."
    )


@contextmanager
def _progress(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of finished runs. It draws a bar on a terminal, and lines in a file."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task(what, total=total)
            yield lambda done: progress.update(bar, completed=done)
        return
    printed = -1

    def print_line(done: int) -> None:
        nonlocal printed
        if done > printed:
            printed = done
            console.print(f"{what}: {done} of {total} done", highlight=False, soft_wrap=True)

    print_line(0)
    yield print_line


def _run(model: DemoCheckpoint, checkpoint: Path, row: DemoRow, tasks: Sequence[str], results: Path) -> DemoRun:
    """The run of one model with one row's schedule."""
    options = {
        "model": model.family.model_name,
        "model_args": f"schedule={row},{model_arguments(model, checkpoint)}",
        "tasks": ",".join(tasks),
        "include_path": str(task_configs()),
    }
    # The harness cannot take a comma in its output path.
    return DemoRun(options, results / re.sub(r"[^A-Za-z0-9.@]+", "-", str(row)))


def _record(model: DemoCheckpoint, row: DemoRow, results: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """One run as the returned record lists it."""
    report = RunReport.of_results(results)
    assert report is not None, "a model of this package"
    scores = {task: score(results, task) for task in tasks}
    fields = {
        "model": model.family.model_name,
        "schedule": str(row),
        "role": row.role,
        "solved": report.schedule,
        "averages": written(report.averages),
    }
    return {**fields, "scores": scores}
