"""Is a schedule good? Its paired differences to the unpruned run, to random at the same tokens, and to the best stored row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_prune.leaderboard.compare import Draws, rel_difference
from lmms_prune.leaderboard.entries import Entry, entries
from lmms_prune.leaderboard.interval import Interval
from lmms_prune.leaderboard.reader import SamplesReader
from lmms_prune.leaderboard.records import Problem
from lmms_prune.leaderboard.results import read_results
from lmms_prune.leaderboard.rows import ORACLE, UNPRUNED
from lmms_prune.leaderboard.statistics import verdict
from lmms_prune.leaderboard.table import RESAMPLES, SAME_BUDGET

UNPRUNED_RUN, RANDOM, BEST = "the unpruned run", "random at the same tokens", "the best stored row with as many tokens"


@dataclass(frozen=True)
class Difference:
    """A row's mean score relative to the unpruned run (Rel, in points of percent), minus that of another row.

    Args:
        role: what the other row is: one of `UNPRUNED_RUN`, `RANDOM`, `BEST`.
        other: its label.
        tokens: its measured tokens.
        interval: of the difference, paired on the same documents.
    """

    role: str
    other: str
    tokens: float
    interval: Interval

    def __str__(self) -> str:
        low, high = self.interval.low, self.interval.high
        words = verdict(self.interval, "better", "worse")
        return (
            f"{self.interval.value:+.1f} [{low:+.1f}, {high:+.1f}] {words} than {self.role}: {self.other} "
            f"({self.tokens:.0f} tokens)".replace("not distinguishable than", "not distinguishable from")
        )

    def to_dict(self) -> dict[str, Any]:
        """In JSON types."""
        points = {"difference": self.interval.value, "low": self.interval.low, "high": self.interval.high}
        return {"role": self.role, "other": self.other, **points}


def differences(results: Path, solved: str) -> list[Difference]:
    """The differences of the newest run of a schedule to the other rows of its model.

    Args:
        results: the folder of one model's results, those of earlier demos among them.
        solved: the schedule as its run recorded it.

    Returns:
        none without an unpruned run, or if the runs share no task.
    """
    problems: list[Problem] = []
    rows = entries(read_results([results]).records, problems, reader := SamplesReader())
    own = [entry for entry in rows if entry.schedule == solved and entry.kind != UNPRUNED]
    unpruned = [entry for entry in rows if entry.kind == UNPRUNED]
    if not own or not unpruned:
        return []
    entry = max(own, key=_newest)
    baseline = max(unpruned, key=lambda other: (_shares(entry, other), _newest(other)))
    draws = Draws(rows, RESAMPLES, 0, reader)
    return list(_differences(entry, baseline, rows, draws))


def _differences(entry: Entry, baseline: Entry, rows: Sequence[Entry], draws: Draws) -> Iterator[Difference]:
    tasks = [task for task in entry.tasks if baseline.scores.get(task)]
    others = [row for row in rows if row is not entry and row is not baseline and row.kind != ORACLE]
    others = [row for row in others if _has(row, tasks) and row.schedule != entry.schedule]
    controls = [row for row in others if row.is_random and _near(row, entry, both_ways=True)]
    stored = [row for row in others if row.kind != UNPRUNED and not row.is_random and _near(row, entry)]
    candidates = [(UNPRUNED_RUN, [baseline]), (RANDOM, controls), (BEST, stored)]
    for role, choices in candidates:
        compared = []
        for other in choices:
            gain = rel_difference(entry, other, baseline, tasks, draws)
            if gain is not None:
                compared.append(Difference(role, other.label, other.avg_visual_tokens or 0.0, gain))
        if compared:
            # The best other row is the one over which this row gains least.
            yield min(compared, key=lambda difference: difference.interval.value)


def _near(row: Entry, entry: Entry, both_ways: bool = False) -> bool:
    """Whether a row has no more tokens than `entry` by more than the leaderboard's tolerance, or nearly as many."""
    limit, other = entry.avg_visual_tokens, row.avg_visual_tokens
    if limit is None or other is None:
        return False
    return other <= (1 + SAME_BUDGET) * limit and (not both_ways or other >= (1 - SAME_BUDGET) * limit)


def _has(row: Entry, tasks: Sequence[str]) -> bool:
    return bool(tasks) and set(tasks) <= set(row.tasks)


def _shares(entry: Entry, other: Entry) -> int:
    return len(set(entry.tasks) & set(other.tasks))


def _newest(entry: Entry) -> str:
    return max(source.date for run in entry.runs for source in run.sources)
