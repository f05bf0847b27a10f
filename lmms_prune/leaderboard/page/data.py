"""The page's data: all that it shows of the table, in JSON's types. The page's script names these keys."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from os.path import commonpath
from typing import Any

from lmms_prune.errors import ScheduleError
from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.grids import digits, label, letters
from lmms_prune.leaderboard.notes import explanations
from lmms_prune.leaderboard.rows import Against, Cost, Leaderboard, ModelTable, ScoreCell, TableRow
from lmms_prune.leaderboard.statistics import Interval
from lmms_prune.record.run import VERSIONS
from lmms_prune.schedule import Schedule

_COSTS = (
    "avg_visual_tokens",
    "share_tokens",
    "kv_mib",
    "share_kv",
    "prefill_tflops",
    "share_flops",
    "samples_per_second",
)


def described(board: Leaderboard) -> dict[str, Any]:
    """The table, without what changed from answer to answer."""
    runs = [run for model in board.models for row in model.rows for run in row.runs]
    sources = [source for run in runs for source in run.sources]
    return {
        "models": [_model(model) for model in board.models],
        "marks": letters(board),
        "notes": explanations(board, True),
        "problems": [plain_text(str(problem)) for problem in board.problems],
        "versions": {
            name: sorted({source.facts[name] for source in sources if name in source.facts}) for name in VERSIONS
        },
        "files": len({source.path for source in sources}),
        "latest": max((source.date for source in sources), default=""),
    }


def _model(model: ModelTable) -> dict[str, Any]:
    place = {id(row): i for i, budget in enumerate(model.budgets) for row in budget.rows}
    return {
        "title": model.title,
        "model": model.model,
        "tasks": [{"task": task, "name": model.column(task), "digits": digits(task)} for task in model.tasks],
        "budgets": [budget.title for budget in model.budgets],
        "rows": [{**_row(row, model), "budget": place[id(row)]} for row in model.rows],
    }


def _row(row: TableRow, model: ModelTable) -> dict[str, Any]:
    printed = row.published
    sure = row.rel_interval
    return {
        "label": label(row),
        "schedule": row.label,
        "stages": stages(row),
        "kind": row.kind,
        "seeds": list(row.seeds),
        "baseline": row.baseline,
        "device": row.cost.device,
        "cost": _cost(row.cost),
        "acc": _number(row.acc),
        "rel": _number(row.rel),
        "rel_sd": _number(row.rel_sd),
        "rel_interval": None if sure is None else [_number(100 + sure.low), _number(100 + sure.high)],
        "above_blind": _number(row.above_blind),
        "random": _against(row.random),
        "marks": list(row.marks),
        "missing": [TASKS[task].name for task in row.missing],
        "published": None
        if printed is None
        else {"name": f"{printed.name} {printed.budget}".strip(), "acc": printed.acc, "rel": printed.rel},
        "cells": {task: _cell(row.cells[task]) for task in model.tasks if task in row.cells},
        "commands": commands(source.command for run in row.runs for source in run.sources),
    }


def stages(row: TableRow) -> list[str]:
    """The stages of a row's schedule; none if it cannot be read (any more)."""
    try:
        return [str(stage) for stage in Schedule.parse((row.runs[0].schedule if row.runs else None) or "none").stages]
    except ScheduleError:
        return []


def _cost(cost: Cost) -> dict[str, float | str | None]:
    found: dict[str, float | None] = {name: _number(getattr(cost, name)) for name in _COSTS}
    speed = cost.samples_per_second
    found |= {"seconds": _number(1 / speed) if speed else None, "share_speed": _number(cost.share_speed)}
    return {**found, "no_share_speed": cost.no_share_speed, "unlike": cost.unlike}


def _cell(cell: ScoreCell) -> dict[str, Any]:
    found = cell.comparison
    made: dict[str, Any] = {"score": _number(cell.score), "sd": _number(cell.sd), "random": _against(cell.random)}
    made |= {"kept": _number(cell.retention), "above_blind": _number(cell.above_blind)}
    made |= {"published": cell.published, "extras": {name: _number(value) for name, value in cell.extras.items()}}
    if found is not None:
        made |= {"change": _interval(found.difference), "p": _number(found.p_holm), "verdict": found.verdict}
        made |= {"lost": _number(found.worse), "gained": _number(found.better), "units": found.units}
        made |= {"same": _number(found.agreement), "detectable": _number(found.detectable)}
    return {name: value for name, value in made.items() if value not in (None, {})}


def _against(found: Against | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"other": found.other, "verdict": found.verdict, "difference": _interval(found.difference)}


def _interval(found: Interval) -> list[float | None]:
    return [_number(value) for value in (found.value, found.low, found.high)]


def _number(value: float | None) -> float | None:
    """As many digits as anybody reads; what is no number is null."""
    return None if value is None or not isfinite(value) else float(f"{value:.6g}")


def plain_text(text: str, longest: int | None = None) -> str:
    """Any text in a form that every file takes; cut after `longest` letters."""
    # Half of a surrogate pair, which a model's output may end with, cannot be written.
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if longest is None or len(text) <= longest else f"{text[: longest - 1]}…"


def commands(made: Iterable[str]) -> list[str]:
    """What repeats some runs; runs that differ in their task and their folder only become one command."""
    same: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for command in made:
        rest, taken = _without(shlex.split(command), ("--tasks", "--output_path"))
        same.setdefault(tuple(rest), []).append(taken)
    joined = []
    for words, parts in same.items():
        tasks = dict.fromkeys(task for part in parts for task in part.get("--tasks", "").split(",") if task)
        folders = [part["--output_path"] for part in parts if "--output_path" in part]
        more = ["--tasks", ",".join(tasks)] if tasks else []
        more += ["--output_path", _shared(folders)] if folders else []
        joined.append(shlex.join([*words, *more]))
    return joined


def _without(words: Sequence[str], names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """A command without some options, and their values."""
    rest, taken, left = [], {}, iter(words)
    for word in left:
        if word in names:
            taken[word] = next(left)
        else:
            rest.append(word)
    return rest, taken


def _shared(folders: Sequence[str]) -> str:
    """The folder, or the one that holds them all."""
    mixed = len({folder.startswith("/") for folder in folders}) > 1
    return folders[0] if mixed else commonpath(folders) or "."
