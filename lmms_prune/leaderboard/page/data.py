"""The page's data: all that it shows of the leaderboard, in JSON types. The page's script reads these keys."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from os.path import commonpath
from pathlib import Path
from typing import Any

from lmms_prune.errors import ScheduleError
from lmms_prune.leaderboard.benchmarks import GROUPS, TASKS
from lmms_prune.leaderboard.cost_table import paper_costs
from lmms_prune.leaderboard.grids import TextTable, by_group, digits, label, letters
from lmms_prune.leaderboard.interval import Interval
from lmms_prune.leaderboard.notes import MARKED, explanations
from lmms_prune.leaderboard.rows import Against, Cost, Leaderboard, ModelTable, ScoreCell, TableRow
from lmms_prune.record.run import VERSIONS
from lmms_prune.schedule import Schedule
from lmms_prune.terminal.appearance import COLOURS, MARKERS, of_method

Submitters = Mapping[Path, str]

_COSTS = (
    "avg_visual_tokens",
    "share_tokens",
    "kv_mib",
    "share_kv",
    "prefill_tflops",
    "share_flops",
)


def described(board: Leaderboard, title: str, submitters: Submitters) -> dict[str, Any]:
    """Return the leaderboard without the changed answers.

    Args:
        board: the leaderboard, with names for paths.
        title: the page's title.
        submitters: who submitted each result, by its file's path in `board`.
    """
    runs = [run for model in board.models for row in model.rows for run in row.runs]
    sources = [source for run in runs for source in run.sources]
    looks = {name: of_method(name) for model in board.models for row in model.rows for name in methods(row)}
    return {
        "title": plain_text(title),
        "submitters": sorted({plain_text(name) for name in submitters.values()}),
        "looks": {
            "colours": COLOURS,
            "markers": {name: outline for name, (_, outline) in MARKERS.items()},
            "methods": {name: [look.colour, look.marker] for name, look in looks.items()},
        },
        "models": [
            {**_model(model, submitters), "paper_costs": _text_table(paper_costs(model, board))}
            for model in board.models
        ],
        "marks": letters(board),
        "notes": explanations(board, True),
        "real": MARKED,
        "problems": [plain_text(str(problem)) for problem in board.problems],
        "versions": {
            name: sorted({source.facts[name] for source in sources if name in source.facts}) for name in VERSIONS
        },
        "files": len({source.path for source in sources}),
        "first": min((_day(source.date) for source in sources), default=""),
        "latest": max((_day(source.date) for source in sources), default=""),
    }


def _day(date: str) -> str:
    """Turn lmms-eval's date of a run (20260101_000000) into a day; another text stays as it is."""
    day = date[:8]
    return f"{day[:4]}-{day[4:6]}-{day[6:]}" if len(day) == 8 and day.isdecimal() else plain_text(date)


def _model(model: ModelTable, submitters: Submitters) -> dict[str, Any]:
    budget_index = {id(row): i for i, budget in enumerate(model.budgets) for row in budget.rows}
    return {
        "title": model.title,
        "model": model.model,
        "tasks": [
            {
                "task": task,
                "name": model.column(task),
                "digits": digits(task),
                "lower": not TASKS[task].higher_is_better,
            }
            for task in model.tasks
        ],
        "groups": None if (grouped := by_group(model)) is None else {"names": _groups(model), "note": grouped.notes[0]},
        "budgets": [budget.title for budget in model.budgets],
        "rows": [{**_row(row, model, submitters), "budget": budget_index[id(row)]} for row in model.rows],
    }


def _text_table(table: TextTable | None) -> dict[str, Any] | None:
    if table is None:
        return None
    lines = [list(line.cells) for line in table.lines]
    return {"title": table.title, "columns": list(table.columns), "lines": lines, "notes": list(table.notes)}


def _groups(model: ModelTable) -> list[str]:
    present = {TASKS[task].group for task in model.tasks}
    return [group for group in GROUPS if group in present]


def _row(row: TableRow, model: ModelTable, submitters: Submitters) -> dict[str, Any]:
    printed = row.published
    sources = [source for run in row.runs for source in run.sources]
    interval = row.rel_interval
    return {
        "label": label(row),
        "schedule": row.label,
        "stages": stages(row),
        "methods": methods(row),
        "date": max((_day(source.date) for source in sources), default=""),
        "submitters": sorted({plain_text(submitters[s.path]) for s in sources if s.path in submitters}),
        "kind": row.kind,
        "seeds": list(row.seeds),
        "baseline": row.baseline,
        "device": row.cost.device,
        "cost": _cost(row.cost),
        "acc": _number(row.acc),
        "rel": _number(row.rel),
        "rel_sd": _number(row.rel_sd),
        "groups": {name: {"acc": _number(mean.acc), "rel": _number(mean.rel)} for name, mean in row.groups.items()},
        "rel_interval": None if interval is None else [_number(100 + interval.low), _number(100 + interval.high)],
        "above_blind": _number(row.above_blind),
        "random": _against(row.random),
        "marks": list(row.marks),
        "missing": [TASKS[task].name for task in row.missing],
        "published": None
        if printed is None
        else {
            "name": f"{printed.name} {printed.budget}".strip(),
            "acc": printed.acc,
            "rel": printed.rel,
            "unlike": list(row.unlike),
        },
        "cells": {task: _cell(row.cells[task]) for task in model.tasks if task in row.cells},
        "commands": commands(source.command for run in row.runs for source in run.sources),
    }


def stages(row: TableRow) -> list[str]:
    """Return the stages of a row's schedule; empty if this version cannot parse it."""
    try:
        return [str(stage) for stage in Schedule.parse((row.runs[0].schedule if row.runs else None) or "none").stages]
    except ScheduleError:
        return []


def methods(row: TableRow) -> list[str]:
    """Return the methods of a row's stages, each once and in their order; "none" for a row without any."""
    return list(dict.fromkeys(stage.partition("@")[0] for stage in stages(row))) or ["none"]


def _cost(cost: Cost) -> dict[str, float | str | None]:
    columns: dict[str, float | None] = {name: _number(getattr(cost, name)) for name in _COSTS}
    speed = cost.samples_per_second if cost.has_speed else None
    columns |= {
        "samples_per_second": _number(speed),
        "samples_per_second_low": _number(cost.samples_per_second_low),
        "samples_per_second_high": _number(cost.samples_per_second_high),
        "seconds": _number(1 / speed) if speed else None,
        "share_speed": None if cost.share_speed_low is None else _number(cost.share_speed),
        "share_speed_low": _number(cost.share_speed_low),
        "share_speed_high": _number(cost.share_speed_high),
    }
    return {**columns, "no_share_speed": cost.no_share_speed, "unlike": cost.unlike}


def _cell(cell: ScoreCell) -> dict[str, Any]:
    comparison = cell.comparison
    entry: dict[str, Any] = {"score": _number(cell.score), "sd": _number(cell.sd), "random": _against(cell.random)}
    entry |= {"kept": _number(cell.retention), "above_blind": _number(cell.above_blind)}
    entry |= {
        "published": cell.published,
        "unlike": list(cell.unlike) or None,
        "extras": {name: _number(value) for name, value in cell.extras.items()},
    }
    if comparison is not None:
        entry |= {
            "change": _interval(comparison.difference),
            "p": _number(comparison.p_holm),
            "verdict": comparison.verdict,
            "mark": comparison.mark or None,
        }
        entry |= {"lost": _number(comparison.worse), "gained": _number(comparison.better), "units": comparison.units}
        entry |= {"same": _number(comparison.agreement), "detectable": _number(comparison.detectable)}
    return {name: value for name, value in entry.items() if value not in (None, {})}


def _against(against: Against | None) -> dict[str, Any] | None:
    if against is None:
        return None
    return {"other": against.other, "verdict": against.verdict, "difference": _interval(against.difference)}


def _interval(interval: Interval) -> list[float | None]:
    return [_number(value) for value in (interval.value, interval.low, interval.high)]


def _number(value: float | None) -> float | None:
    """Round to six significant digits; NaN and infinities become null."""
    return None if value is None or not isfinite(value) else float(f"{value:.6g}")


def plain_text(text: str, longest: int | None = None) -> str:
    """Make a text writable to any file, and truncate it to `longest` characters."""
    # A model's output may end with half of a surrogate pair, which cannot be encoded.
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if longest is None or len(text) <= longest else f"{text[: longest - 1]}…"


def commands(run_commands: Iterable[str]) -> list[str]:
    """Return the commands that repeat some runs; runs that differ only in task and folder are joined into one."""
    by_rest: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for command in run_commands:
        rest, options = _without(shlex.split(command), ("--tasks", "--output_path"))
        by_rest.setdefault(tuple(rest), []).append(options)
    joined = []
    for words, parts in by_rest.items():
        tasks = dict.fromkeys(task for part in parts for task in part.get("--tasks", "").split(",") if task)
        folders = [part["--output_path"] for part in parts if "--output_path" in part]
        merged = ["--tasks", ",".join(tasks)] if tasks else []
        merged += ["--output_path", _shared(folders)] if folders else []
        joined.append(shlex.join([*words, *merged]))
    return joined


def _without(words: Sequence[str], names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Split a command into its words without the options in `names`, and those options' values."""
    rest, options, remaining = [], {}, iter(words)
    for word in remaining:
        if word in names:
            options[word] = next(remaining)
        else:
            rest.append(word)
    return rest, options


def _shared(folders: Sequence[str]) -> str:
    """Return the common parent folder; the first folder if absolute and relative ones are mixed."""
    mixed = len({folder.startswith("/") for folder in folders}) > 1
    return folders[0] if mixed else commonpath(folders) or "."
