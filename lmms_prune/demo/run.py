"""Runs the demo: real lmms-eval processes on local data, for both trained models."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any
from zlib import crc32

from rich import box
from rich.console import Console
from rich.table import Table

from lmms_prune.demo.benchmarks import TASKS, mirror_in
from lmms_prune.demo.comparison import BEST, differences
from lmms_prune.demo.models import MODELS, DemoCheckpoint, DemoError, model_arguments, sizes, weights
from lmms_prune.demo.processes import DemoRun, RunError, evaluate
from lmms_prune.demo.proposals import proposals
from lmms_prune.efficiency.estimate import prompt_sizes
from lmms_prune.harness.tasks import task_configs
from lmms_prune.leaderboard.benchmarks import TASKS as BENCHMARKS
from lmms_prune.leaderboard.benchmarks import rel, score
from lmms_prune.pruning.block import bound
from lmms_prune.record.accounting import written
from lmms_prune.record.redaction import secret_values
from lmms_prune.record.run import RunReport
from lmms_prune.schedule import ADAPTIVE, Schedule
from lmms_prune.schedule.budgets import Budget
from lmms_prune.terminal.progress import Progress

ROWS, QUICK_ROWS = 96, 24  # questions of each benchmark
# Of one process on one core: the full demo, 40 runs of 960 answers, took two processes about twelve minutes (docs/demo.md).
SECONDS_A_RUN, SECONDS_AN_ANSWER = 6.0, 0.03
PAPER_DEPTH, CALIBRATED, CONTROL = "the paper's depth", "calibrated", "the control"


@dataclass(frozen=True)
class DemoRow:
    """One row of the demo's table.

    Args:
        schedule: the schedule.
        budget: solves its ``?``.
        role: PAPER_DEPTH or CALIBRATED for the rows that show why the horizon must be measured, CONTROL for random at the
            same tokens as a user's row, else empty.
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
        row = cls.of(text)
        # lmms-eval starts in another folder, and the code of a method of the user's own is tried before anything runs.
        row = replace(row, schedule=bound(row.schedule.absolute))
        row.solved().check(model.layers)
        return row

    def solved(self) -> Schedule:
        """The schedule with its ``?`` solved for the first model's square picture."""
        return self.schedule if self.budget is None else self.schedule.solve(self.budget, prompt_sizes(sizes()))

    @property
    def label(self) -> str:
        """The row's text in tables: a method's file without its folder."""
        return str(replace(self, schedule=self.schedule.portable))

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


def judged(rows: Sequence[DemoRow]) -> tuple[AnyRow, ...]:
    """The rows that a user named, with what each is judged by: the unpruned run, and random at the same tokens.

    Random acts at the layer of a row's first stage. A row that keeps all tokens or none, or that decides by itself how
    many, has no such control; nor has one that is random already.
    """
    model, wanted = sizes(), [DemoRow.of("none"), *rows]
    tokens = model.tokens_per_image or model.example_tokens
    for row in rows:
        solved = row.solved()
        share = float(solved.avg_visual_tokens(model.layers, [tokens]) / tokens)
        adaptive = any(stage.keep == ADAPTIVE for stage in solved.stages)
        if not adaptive and 0 < share < 1 and any(stage.method != "random" for stage in solved.stages):
            budget = Budget.parse(f"{share:.4f}")
            wanted.append(DemoRow(Schedule.parse(f"random@{solved.stages[0].layer}:?"), budget, role=CONTROL))
    return tuple(dict.fromkeys(wanted))


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
    compared: Sequence[DemoRow] = (),
) -> dict[str, Any]:
    """Build the data if it does not exist, evaluate both models with every schedule, and return the results.

    Args:
        folder: an absolute path. Existing data in it is reused, and results of earlier runs are kept.
        rows: the schedules.
        count: questions of each benchmark; even.
        tasks: some of `TASKS`.
        environment: the environment of the child processes.
        console: shows the progress.
        compared: the rows to compare with the unpruned run, random and the best stored row.

    Returns:
        keys ``mirror`` (the folder to start lmms-eval in), ``command`` (the command line of a successful run, if possible
        of one with a budget), ``runs`` (model, schedule, role, solved, averages, scores), ``comparisons`` (model, schedule,
        stored, differences) and ``failures`` (model, schedule, error).

    Raises:
        DemoError: a model is missing, data is damaged, or lmms-eval cannot use the folder's name.
        RunError: a run failed for a reason that all runs share.
        OSError: `folder` cannot be written.
    """
    if "," in str(folder):
        raise DemoError(f"--out {folder}: lmms-eval cannot take a comma in a path; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = {model: weights(model) for model in MODELS}
    with console.status("drawing the ten benchmarks"):
        mirror = mirror_in(folder, count)
    pairs = [(model, row.for_model(model)) for model in MODELS for row in rows]
    results = folder / f"results-{count}"
    runs = [_run(model, checkpoints[model], row, tasks, results / model.folder) for model, row in pairs]
    one_thread = {**environment, "OMP_NUM_THREADS": "1"}
    expected = expected_time(len(runs), len(tasks), count, os.cpu_count() or 1)
    console.print(f"On idle cores this takes {expected}.", highlight=False)
    with Progress(f"{len(runs)} runs of lmms-eval, {len(tasks)} tasks each", len(runs)) as progress:
        outcomes = evaluate(runs, results, mirror, one_thread, secret_values(environment), progress.update)
    record: dict[str, Any] = {"mirror": str(mirror), "runs": [], "failures": []}
    commands: list[tuple[bool, str]] = []
    for (model, row), run, outcome in zip(pairs, runs, outcomes, strict=True):
        if isinstance(outcome, RunError):
            record["failures"].append({"model": model.family.model_name, "schedule": row.label, "error": str(outcome)})
        else:
            record["runs"].append(_record(model, row, outcome, tasks))
            commands.append((row.budget is None, shlex.join(run.command)))
    record["comparisons"] = list(_comparisons(pairs, record["runs"], results, compared))
    # A command with a budget is the first hybrid's, which shows more of pruning than the unpruned model's.
    record["command"] = min(commands, key=itemgetter(0), default=(True, ""))[1]
    return record


def _comparisons(
    pairs: Sequence[tuple[DemoCheckpoint, DemoRow]],
    runs: Sequence[Mapping[str, Any]],
    results: Path,
    compared: Sequence[DemoRow],
) -> Iterator[dict[str, Any]]:
    """The differences of each compared row that ran, model by model."""
    for model, row in pairs:
        name = model.family.model_name
        run = next((run for run in runs if (run["model"], run["schedule"]) == (name, row.label)), None)
        if row in compared and run is not None:
            to_others = differences(results / model.folder, run["solved"])
            yield {"model": name, "folder": model.folder, "schedule": row.label, "differences": to_others}


def verdicts(record: Mapping[str, Any]) -> list[str]:
    """The comparisons in words, a line each: Rel is the mean share of the unpruned scores, in percent."""
    lines = []
    for comparison in record["comparisons"]:
        lines += [f"{comparison['folder']}, {comparison['schedule']}: Rel, in points, with its 95 % interval:"]
        lines += [f"  {difference}" for difference in comparison["differences"]]
        roles = {difference.role for difference in comparison["differences"]}
        if BEST not in roles:
            lines.append(
                "  no stored row with as many tokens and these tasks: `lmms-prune demo` in this folder stores "
                f"{len(FULL)} rows (and any `--schedule` its own), with which later ones are compared."
            )
    return lines


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


def expected_time(runs: int, tasks: int, rows: int, processes: int) -> str:
    """How long runs will take, in words, before any has finished."""
    seconds = runs * (SECONDS_A_RUN + tasks * rows * SECONDS_AN_ANSWER) / max(1, min(processes, runs))
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"


def _run(model: DemoCheckpoint, checkpoint: Path, row: DemoRow, tasks: Sequence[str], results: Path) -> DemoRun:
    """The run of one model with one row's schedule."""
    options = {
        "model": model.family.model_name,
        "model_args": f"schedule={row},{model_arguments(model, checkpoint)}",
        "tasks": ",".join(tasks),
        "include_path": str(task_configs()),
    }
    # The harness cannot take a comma in its output path. Files of one name in two folders need two.
    name = re.sub(r"[^A-Za-z0-9.@]+", "-", row.label)
    if row.label != str(row):
        name += f"-{crc32(str(row).encode()):08x}"
    return DemoRun(options, results / name)


def _record(model: DemoCheckpoint, row: DemoRow, results: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """One run as the returned record lists it."""
    report = RunReport.of_results(results)
    assert report is not None, "a model of this package"
    scores = {task: score(results, task) for task in tasks}
    fields = {
        "model": model.family.model_name,
        "schedule": row.label,
        "role": row.role,
        "solved": report.schedule,
        "averages": written(report.averages),
    }
    return {**fields, "scores": scores}
