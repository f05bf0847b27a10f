"""The paper's Tables 1 and 2 (arXiv 2512.07580), to stand beside our rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lmms_prune.leaderboard.benchmarks import BENCHMARKS
from lmms_prune.schedule import Schedule
from lmms_prune.schedule.presets import PRESETS

_FILE = Path(__file__).with_name("published.json")
_TASK = {benchmark.name: benchmark.tasks[0] for benchmark in BENCHMARKS}


@dataclass(frozen=True)
class PublishedRow:
    """One printed row.

    Args:
        model: as the paper calls it.
        table: its number.
        name: of the row; "unpruned" is the upper bound.
        budget: as printed: 192 or 64 tokens, or 50pct.
        scores: by the column's name.
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
    def by_task(self) -> dict[str, float | None]:
        """The scores under the name of each benchmark's first task."""
        return {_TASK[name]: value for name, value in self.scores.items()}


@cache
def published() -> tuple[PublishedRow, ...]:
    """All printed rows, in the order of the tables."""
    rows = []
    for table in json.loads(_FILE.read_text(encoding="utf-8"))["tables"]:
        for row in table["rows"]:
            printed = {key: float(value) for key, value in row["printed"].items()}
            scores = {name: float(value) for name, value in row["scores"].items()}
            about = (table["model"], table["table"], row["name"], row["budget"])
            rows.append(PublishedRow(*about, scores, printed.get("Acc"), printed["Rel"]))
    return tuple(rows)


def match(model: str, schedule: str | None) -> PublishedRow | None:
    """The printed row of the same model and schedule, the schedule being one of the row's presets.

    Args:
        model: a checkpoint's name or folder; it must hold the paper's name of the model.
        schedule: as executed.
    """
    if schedule is None:
        return None
    for row in published():
        if row.model.lower() not in model.lower():
            continue
        if row.name == "unpruned" and schedule == "none":
            return row
        name = f"{row.name.lower()}-{row.budget}"
        forms = (PRESETS.get(name + suffix) for suffix in ("", "-release", "-measured"))
        if schedule in [str(Schedule.parse(form)) for form in forms if form is not None]:
            return row
    return None
