"""Run the demo: real lmms-eval processes over local data, for both of the trained models."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import datasets
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lmms_prune.demo.benchmarks import TASKS, build_mirror, damaged_files, drawn_by
from lmms_prune.demo.models import LAYERS, MODELS, DemoError, Model, model_arguments, weights
from lmms_prune.demo.processes import Run, RunError, evaluate
from lmms_prune.efficiency.estimate import prompt_sizes
from lmms_prune.harness.tasks import task_configs
from lmms_prune.leaderboard.benchmarks import TASKS as BENCHMARKS
from lmms_prune.leaderboard.benchmarks import rel, score
from lmms_prune.models.architectures import architecture
from lmms_prune.record.accounting import written
from lmms_prune.record.redaction import secret_values
from lmms_prune.record.run import RunReport
from lmms_prune.schedule import Schedule

ROWS, QUICK_ROWS = 96, 24  # questions of each benchmark


@dataclass(frozen=True)
class Row:
    """One schedule of the table, with the budget that solves its "?"."""

    schedule: str
    budget: str | None = None

    @classmethod
    def parse(cls, text: str) -> Row:
        """A row from its text, as in --model_args: a schedule, then maybe ",budget=…".

        Raises:
            ScheduleError: the schedule or its budget is wrong, or does not fit the models.
        """
        Schedule.parse(text, prompt_sizes(architecture(str(weights(MODELS[0]))))).check(LAYERS)
        schedule, _, budget = text.partition(",budget=")
        return cls(schedule, budget or None)

    def __str__(self) -> str:
        return self.schedule if self.budget is None else f"{self.schedule},budget={self.budget}"


# The paper's hybrids act before layers 2 and 20 of 32; here before 1 and 8 of 12.
_HYBRID = "dart@1:?,random@8:{late}"
QUICK = (
    Row("none"),
    Row("random@1:1.0"),
    Row(_HYBRID.format(late=0.1), "0.5"),
    Row(_HYBRID.format(late=0.03), "0.25"),
    Row("blind@0"),
)
_SINGLE = ("dart@1:?", "divprune@1:?", "fastv@1:?", "random@1:?", "stride@1:?", "pool@1:?")
FULL = (
    Row("none"),
    *(
        Row(text, budget)
        for budget, late in (("0.5", 0.1), ("0.25", 0.03))
        for text in (_HYBRID.format(late=late), f"divprune@1:?,random@8:{late}", *_SINGLE)
    ),
    Row("vtw@8"),
    Row("blind@0"),
)


def task_names(text: str | None) -> list[str]:
    """The tasks of `text`, names with commas; all ten for None.

    Raises:
        DemoError: a task that the demo does not have, or none at all.
    """
    names = list(TASKS) if text is None else [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in TASKS]:
        raise DemoError(f"--tasks: '{unknown[0]}' is not in the demo; it has {', '.join(TASKS)}.")
    if not names:
        raise DemoError(f"--tasks: '{text}' names no task; the demo has {', '.join(TASKS)}.")
    return names


def run_demo(
    folder: Path,
    rows: Sequence[Row],
    count: int,
    tasks: Sequence[str],
    environment: Mapping[str, str],
    console: Console,
) -> dict[str, Any]:
    """Build the data if it is not there, run both models with every schedule, and return the results.

    Args:
        folder: absolute; data that is there already is used as it is, results of earlier runs stay beside the new.
        rows: the schedules.
        count: questions of each benchmark, even.
        tasks: some of `TASKS`.
        environment: of the child processes.
        console: for progress.

    Returns:
        keys ``mirror`` (the folder to start lmms-eval in), ``command`` (of a run that went well, with a budget if one
        has it), ``runs``
        (model, schedule, scores, averages) and ``failures`` (model, schedule, error).

    Raises:
        DemoError: a missing model, damaged data, or a folder whose name lmms-eval cannot take.
        RunError: a run failed for a reason that all of them share.
        OSError: `folder` cannot be written.
    """
    if "," in str(folder):
        raise DemoError(f"--folder {folder}: lmms-eval cannot take a comma in a path; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = {model: weights(model) for model in MODELS}
    mirror = folder / f"mirror-{count}-{drawn_by()}"
    if not mirror.exists():
        datasets.disable_progress_bars()
        with console.status("drawing the ten benchmarks"):
            build_mirror(mirror, rows=count)
    elif damaged := next(damaged_files(mirror), None):
        raise DemoError(f"the data has changed since it was drawn: {damaged}. Delete {mirror} to have it drawn again.")
    jobs = [(model, row) for model in MODELS for row in rows]
    results = folder / f"results-{count}"
    runs = [_run(model, checkpoints[model], row, tasks, results / model.folder) for model, row in jobs]
    one_thread = {**environment, "OMP_NUM_THREADS": "1"}
    with _progress(console, f"{len(runs)} runs of lmms-eval, {len(tasks)} tasks each", len(runs)) as progressed:
        outcomes = evaluate(runs, results, mirror, one_thread, secret_values(environment), progressed)
    record: dict[str, Any] = {"mirror": str(mirror), "runs": [], "failures": []}
    commands: list[tuple[bool, str]] = []
    for (model, row), run, outcome in zip(jobs, runs, outcomes, strict=True):
        if isinstance(outcome, RunError):
            record["failures"].append({"model": model.wrapper, "schedule": str(row), "error": str(outcome)})
        else:
            record["runs"].append(_record(model, row, outcome, tasks))
            commands.append((row.budget is None, shlex.join(run.command)))
    # The first hybrid says more about pruning than the unpruned model does.
    record["command"] = min(commands, key=itemgetter(0), default=(True, ""))[1]
    return record


def tables(record: Mapping[str, Any], names: Sequence[str]) -> list[Table]:
    """One table a model: a schedule a row, a benchmark of `names` a column, and what is left of the unpruned scores."""
    made = []
    for model in MODELS:
        runs = [run for run in record["runs"] if run["model"] == model.wrapper]
        if not runs:
            continue
        table = Table(box=box.SIMPLE_HEAD, title=model.folder, padding=0, pad_edge=False)
        table.add_column("schedule", overflow="fold")
        for name in ("tokens", *(BENCHMARKS[name].narrow for name in names), "kept"):
            table.add_column(name, justify="right", no_wrap=True)
        whole = next((run for run in runs if run["schedule"] == "none"), None)
        for run in runs:
            scores = ["" if (value := run["scores"][name]) is None else f"{value:.0f}" for name in names]
            kept = rel(run["scores"], whole["scores"]) if whole else None
            label = "\n".join(run["schedule"].split(","))
            tokens = f"{run['averages']['avg_visual_tokens']:.0f}"
            table.add_row(label, tokens, *scores, "" if kept is None else f"{kept:.0f}")
        made.append(table)
    return made


@contextmanager
def _progress(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields what is to be told how many are done: a bar for a terminal, a line now and then for a file."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task(what, total=total)
            yield lambda done: progress.update(bar, completed=done)
        return
    told = -1

    def tell(done: int) -> None:
        nonlocal told
        if done > told:
            told = done
            console.print(f"{what}: {done} of {total} done", highlight=False, soft_wrap=True)

    tell(0)
    yield tell


def _run(model: Model, checkpoint: Path, row: Row, tasks: Sequence[str], results: Path) -> Run:
    options = {
        "model": model.wrapper,
        "model_args": f"schedule={row},{model_arguments(model, checkpoint)}",
        "tasks": ",".join(tasks),
        "include_path": str(task_configs()),
    }
    # The harness cannot take a comma in its output path.
    return Run(options, results / re.sub(r"[^A-Za-z0-9.@]+", "-", str(row)))


def _record(model: Model, row: Row, results: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    report = RunReport.of_results(results)
    assert report is not None, "a model of ours"
    scores = {task: score(results, task) for task in tasks}
    said = {
        "model": model.wrapper,
        "schedule": str(row),
        "solved": report.schedule,
        "averages": written(report.averages),
    }
    return {**said, "scores": scores}
