"""Rows beside each other on the same documents: differences with intervals, tests and flips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from zlib import crc32

import numpy as np
from jaxtyping import Float

from lmms_prune.leaderboard.benchmarks import TASKS, rel
from lmms_prune.leaderboard.entries import Entry
from lmms_prune.leaderboard.rows import Against, Comparison
from lmms_prune.leaderboard.statistics import (
    Interval,
    detectable,
    flips,
    holm,
    interval,
    mcnemar,
    mean_ratio,
    over_seeds,
    resampled,
    verdict,
)

Scores = Float[np.ndarray, " many"]


class Draws:
    """Resampled scores of all entries of one model.

    The draws of a task depend on `seed` and on the task's documents alone: entries with the same documents are scored on
    the same draws, whatever else stands in the table.
    """

    def __init__(self, entries: Sequence[Entry], many: int, seed: int):
        self._scores: dict[tuple[str, str], tuple[str, Scores]] = {}
        for task in sorted({task for entry in entries for task in entry.samples}):
            alike: dict[str, list[Entry]] = {}
            for entry in entries:
                signatures = {one.signature for one in entry.samples.get(task, ())}
                if len(signatures) == 1:
                    alike.setdefault(signatures.pop(), []).append(entry)
            for signature, some in alike.items():
                rng = np.random.default_rng([seed, crc32(task.encode())])
                drawn = resampled([run for entry in some for run in entry.samples[task]], many, rng)
                start = 0
                for entry in some:
                    mine = drawn[:, start : (start := start + len(entry.runs))]
                    # The same seeds of a row in all tasks.
                    chance = np.random.default_rng([seed, crc32(entry.key.encode())])
                    picks = chance.integers(0, len(entry.runs), mine.shape)
                    self._scores[entry.key, task] = signature, over_seeds(mine, picks)

    def pair(self, entry: Entry, other: Entry, task: str) -> tuple[Scores, Scores] | None:
        """Both on the same draws; None if one has no samples of the task, or others."""
        mine, its = self._scores.get((entry.key, task)), self._scores.get((other.key, task))
        return None if mine is None or its is None or mine[0] != its[0] else (mine[1], its[1])

    def ratio(self, entry: Entry, baseline: Entry, tasks: Sequence[str]) -> Scores | None:
        """Rel; None if a task cannot be paired."""
        pairs = {task: self.pair(entry, baseline, task) for task in tasks}
        there = {task: pair for task, pair in pairs.items() if pair is not None}
        if not there or len(there) < len(pairs):
            return None
        return mean_ratio({task: pair[0] for task, pair in there.items()}, {t: pair[1] for t, pair in there.items()})


def comparisons(entry: Entry, baseline: Entry, tasks: Sequence[str], draws: Draws) -> dict[str, Comparison]:
    """Each benchmark beside the baseline, with the p values corrected over those that there are."""
    found = {}
    for task in tasks:
        pair = draws.pair(entry, baseline, task)
        if pair is not None and task in entry.tasks and task in baseline.tasks:
            difference = interval(entry.scores[task] - baseline.scores[task], pair[0] - pair[1])
            found[task] = _comparison(entry, baseline, task, difference)
    corrected = holm([one.p for one in found.values()])
    return {task: replace(one, p_holm=p) for (task, one), p in zip(found.items(), corrected, strict=True)}


def _comparison(entry: Entry, baseline: Entry, task: str, difference: Interval) -> Comparison:
    before, runs = baseline.samples[task][0], entry.samples[task]
    turned = [flips(before.right, run.right) for run in runs]
    single = len(runs) == 1 and len(baseline.runs) == 1
    exact = mcnemar(*turned[0]) if single else None
    p = exact if exact is not None and TASKS[task].binary else difference.p
    return Comparison(
        difference=difference,
        p=p,
        p_holm=p,
        mcnemar=exact,
        worse=fmean(worse for worse, _ in turned),
        better=fmean(better for _, better in turned),
        units=len(before.right),
        agreement=100 * fmean(float((run.answers == before.answers).mean()) for run in runs),
        detectable=detectable(difference.error),
        verdict=verdict(difference, "better than unpruned", "worse than unpruned"),
    )


def rel_interval(entry: Entry, baseline: Entry, tasks: Sequence[str], draws: Draws) -> Interval | None:
    """The interval of Rel minus 100 over `tasks`."""
    drawn, value = draws.ratio(entry, baseline, tasks), _rel(entry, baseline, tasks)
    return None if drawn is None or value is None else interval(value - 100, drawn - 100)


def against_random(
    entry: Entry, control: Entry, baseline: Entry, tasks: Sequence[str], draws: Draws
) -> tuple[Against | None, Mapping[str, Against]]:
    """Rel and each benchmark minus those of the random control."""

    def said(difference: Interval) -> Against:
        return Against(control.label, difference, verdict(difference, "beats random", "below random"))

    cells = {}
    for task in tasks:
        pair = draws.pair(entry, control, task)
        if pair is not None and task in entry.tasks and task in control.tasks:
            cells[task] = said(interval(entry.scores[task] - control.scores[task], pair[0] - pair[1]))
    mine, its = (draws.ratio(one, baseline, tasks) for one in (entry, control))
    values = [_rel(one, baseline, tasks) for one in (entry, control)]
    if mine is None or its is None or values[0] is None or values[1] is None:
        return None, cells
    return said(interval(values[0] - values[1], mine - its)), cells


def _rel(entry: Entry, baseline: Entry, tasks: Sequence[str]) -> float | None:
    return rel(entry.scores, {task: baseline.scores[task] for task in tasks})
