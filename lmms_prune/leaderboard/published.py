"""The paper's Tables 1 to 3 (arXiv 2512.07580), for comparison with our rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lmms_prune.errors import ScheduleError
from lmms_prune.leaderboard.benchmarks import BENCHMARKS
from lmms_prune.schedule import Schedule
from lmms_prune.schedule.presets import PRESETS

_FILE = Path(__file__).with_name("published.json")
_TASK = {benchmark.name: benchmark.tasks[0] for benchmark in BENCHMARKS}


@dataclass(frozen=True)
class Protocol:
    """How the rows of one table are evaluated: see ``model_configs/`` and ``task_configs/``.

    Args:
        settings: model arguments that every row has, as texts.
        tasks: the task of each column.
        method_options: by method, the options that its stages take.
    """

    settings: Mapping[str, str]
    tasks: Mapping[str, str]
    method_options: Mapping[str, Mapping[str, object]]

    def options(self, method: str) -> tuple[tuple[str, object], ...]:
        """Return the options of a stage of a method."""
        return tuple(self.method_options.get(method, {}).items())


@dataclass(frozen=True)
class PublishedRow:
    """One row of a table that the paper prints.

    Args:
        model: the paper's name of the model.
        table: the table's number.
        name: the row's name; "unpruned" is the upper bound.
        budget: as printed: 192 or 64 tokens, or 50pct.
        scores: scores by column name.
        acc, rel: as printed; None where the table has none.
    """

    model: str
    table: int
    name: str
    budget: str
    scores: Mapping[str, float]
    acc: float | None
    rel: float

    @property
    def protocol(self) -> Protocol:
        """Return how the files in ``model_configs/`` evaluate the rows of this table."""
        return _protocols()[self.table]

    @property
    def by_task(self) -> dict[str, float | None]:
        """Return the scores by the name of each benchmark's first task."""
        return {_TASK[name]: value for name, value in self.scores.items()}


@dataclass(frozen=True)
class PublishedCost:
    """One row of the paper's Table 3: what a schedule cost on TextVQA.

    Args:
        model: the paper's name of the model.
        name, budget: as in `PublishedRow`.
        schedule: the schedule from which the printed FLOPs and storage follow; "none" for the unpruned row.
        tokens: the printed, nominal average of visual tokens.
        tflops, mib: the decoder's prefill, and its KV cache.
        cuda_ms, latency_ms: milliseconds a document; the paper does not define either.
        acc: the printed accuracy, a score of TextVQA.
    """

    model: str
    name: str
    budget: str
    schedule: str
    tokens: float
    tflops: float
    mib: float
    cuda_ms: float
    latency_ms: float
    acc: float

    @property
    def label(self) -> str:
        """Return the row's name with its budget."""
        return f"{self.name} {self.budget}".strip()


@cache
def published_costs() -> tuple[PublishedCost, ...]:
    """Return the rows of Table 3, in its order."""
    table = json.loads(_FILE.read_text(encoding="utf-8"))["costs"]
    rows = []
    for row in table["rows"]:
        schedule = str(Schedule.parse(row["measured"])) or "none"
        figures = (float(row[name]) for name in ("tokens", "tflops", "mib", "cuda_ms", "latency_ms", "acc"))
        rows.append(PublishedCost(table["model"], row["name"], row["budget"], schedule, *figures))
    return tuple(rows)


def match_cost(model: str, schedule: str | None) -> PublishedCost | None:
    """Return the row of Table 3 of the same model and schedule, in any form of the row; None if there is none.

    Args:
        model, schedule: as for `match`.
    """
    return cost_of(match(model, schedule))


def cost_of(row: PublishedRow | None) -> PublishedCost | None:
    """Return the row of Table 3 that costs what a row of Tables 1 and 2 scores; None if there is none."""
    if row is None:
        return None
    same = (cost for cost in published_costs() if cost.model == row.model)
    return next((cost for cost in same if (cost.name, cost.budget) == (row.name, row.budget)), None)


@cache
def published() -> tuple[PublishedRow, ...]:
    """Return all printed rows, in the order of the tables."""
    rows = []
    for table in _tables():
        for row in table["rows"]:
            printed = {key: float(value) for key, value in row["printed"].items()}
            scores = {name: float(value) for name, value in row["scores"].items()}
            identity = (table["model"], table["table"], row["name"], row["budget"])
            rows.append(PublishedRow(*identity, scores, printed.get("Acc"), printed["Rel"]))
    return tuple(rows)


def match(model: str, schedule: str | None) -> PublishedRow | None:
    """Return the printed row of the same model whose presets include the schedule; None if there is none.

    Options of methods do not count here: `protocol.differences` names those that differ from the row's.

    Args:
        model: a checkpoint's name or folder; it must contain the paper's name of the model.
        schedule: as executed.
    """
    shape = None if schedule is None else _shape(schedule)
    if shape is None:
        return None
    for row in published():
        if row.model.lower() not in model.lower():
            continue
        if row.name == "unpruned" and schedule == "none":
            return row
        name = f"{row.name.lower()}-{row.budget}"
        forms = (PRESETS.get(name + suffix) for suffix in ("", "-release", "-measured"))
        if shape in [_shape(form) for form in forms if form is not None]:
            return row
    return None


def _shape(schedule: str) -> list[tuple[object, ...]] | None:
    """Return the methods, layers and keeps of a schedule's stages; None if this version cannot parse it."""
    try:
        return [(stage.method, stage.layer, stage.keep) for stage in Schedule.parse(schedule).stages]
    except ScheduleError:
        return None


def contradictions(table: int) -> tuple[str, ...]:
    """Return what the paper's text says that its tables contradict, a sentence each."""
    return tuple(text for entry in _tables() if entry["table"] == table for text in entry.get("contradictions", ()))


@cache
def _tables() -> list[dict[str, Any]]:
    return json.loads(_FILE.read_text(encoding="utf-8"))["tables"]


@cache
def _protocols() -> dict[int, Protocol]:
    """Return the protocols by their table's number."""
    written = {table["table"]: table["protocol"] for table in _tables()}
    return {number: Protocol(p["settings"], p["tasks"], p["options"]) for number, p in written.items()}


def published_text_tokens() -> float:
    """Return the average text tokens of a prompt from which Table 3's FLOPs and storage follow."""
    return float(json.loads(_FILE.read_text(encoding="utf-8"))["costs"]["text_tokens"])
