"""Comparison of rows on the same documents: differences with intervals, tests and flips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from zlib import crc32

import numpy as np
from jaxtyping import Float

from lmms_prune.leaderboard.benchmarks import TASKS, rel
from lmms_prune.leaderboard.entries import Entry
from lmms_prune.leaderboard.interval import Interval
from lmms_prune.leaderboard.reader import SamplesReader
from lmms_prune.leaderboard.rows import ALPHA, STOCK, UNPRUNED, Against, Comparison
from lmms_prune.leaderboard.samples import right_pair
from lmms_prune.leaderboard.statistics import (
    detectable,
    flips,
    holm,
    interval,
    mcnemar,
    mean_ratio,
    over_seeds,
    verdict,
)

Scores = Float[np.ndarray, " resamples"]


class Draws:
    """Resampled scores of all entries of one model, paired by their draws.

    The draws of a task depend only on `seed` and on the task's documents. Entries with the same documents are scored on
    the same draws, whatever other rows the table has.
    """

    def __init__(self, entries: Sequence[Entry], resamples: int, seed: int, reader: SamplesReader):
        self._scores: dict[tuple[str, str], tuple[str, Scores]] = {}
        for task in sorted({task for entry in entries for task in entry.samples}):
            by_signature: dict[str, list[Entry]] = {}
            for entry in entries:
                signatures = {samples.signature for samples in entry.samples.get(task, ())}
                if len(signatures) == 1:
                    by_signature.setdefault(signatures.pop(), []).append(entry)
            for signature, group in by_signature.items():
                runs = [run for entry in group for run in entry.samples[task]]
                drawn = reader.resampled(runs, resamples, (seed, crc32(task.encode())))
                start = 0
                for entry in group:
                    entry_draws = drawn[:, start : (start := start + len(entry.runs))]
                    # Seeded by the row alone, so that a row's resampled seeds are the same in all tasks.
                    seed_rng = np.random.default_rng([seed, crc32(entry.key.encode())])
                    picks = seed_rng.integers(0, len(entry.runs), entry_draws.shape)
                    self._scores[entry.key, task] = signature, over_seeds(entry_draws, picks)

    def pair(self, entry: Entry, other: Entry, task: str) -> tuple[Scores, Scores] | None:
        """Return both entries' scores on the same draws; None if one lacks samples of the task, or has other documents."""
        entry_scores, other_scores = self._scores.get((entry.key, task)), self._scores.get((other.key, task))
        return (
            None
            if entry_scores is None or other_scores is None or entry_scores[0] != other_scores[0]
            else (entry_scores[1], other_scores[1])
        )

    def ratio(self, entry: Entry, baseline: Entry, tasks: Sequence[str]) -> Scores | None:
        """Return Rel on each resample; None if a task cannot be paired."""
        pairs = {task: self.pair(entry, baseline, task) for task in tasks}
        paired = {task: pair for task, pair in pairs.items() if pair is not None}
        if not paired or len(paired) < len(pairs):
            return None
        return mean_ratio({task: pair[0] for task, pair in paired.items()}, {t: pair[1] for t, pair in paired.items()})


def comparisons(entry: Entry, baseline: Entry, tasks: Sequence[str], draws: Draws) -> dict[str, Comparison]:
    """Compare each benchmark with the baseline; p values are Holm-corrected over the compared benchmarks."""
    by_task = {}
    for task in tasks:
        pair = draws.pair(entry, baseline, task)
        if pair is not None and task in entry.tasks and task in baseline.tasks:
            difference = interval(entry.scores[task] - baseline.scores[task], pair[0] - pair[1])
            by_task[task] = _comparison(entry, baseline, task, difference)
    corrected = holm([comparison.p for comparison in by_task.values()])
    name = "unpruned" if baseline.kind in (UNPRUNED, STOCK) else baseline.label
    better, worse = f"better than {name}", f"worse than {name}"
    return {
        task: replace(comparison, p_holm=p, verdict=_real(task, comparison.difference, p, better, worse))
        for (task, comparison), p in zip(by_task.items(), corrected, strict=True)
    }


def _real(task: str, difference: Interval, corrected: float, better: str, worse: str) -> str:
    """Return `better` or `worse` if a p value that is corrected for its family is small enough."""
    if corrected >= ALPHA:
        return "not distinguishable"
    return better if TASKS[task].sign * difference.value > 0 else worse


def _comparison(entry: Entry, baseline: Entry, task: str, difference: Interval) -> Comparison:
    before, runs = baseline.samples[task][0], entry.samples[task]
    flipped = [flips(*right_pair(before, run)) for run in runs]
    single = len(runs) == 1 and len(baseline.runs) == 1
    # McNemar compares one run with one run; over several seeds the p value comes from resampling.
    exact = mcnemar(*flipped[0]) if single else None
    p = exact if exact is not None and TASKS[task].binary else difference.p
    return Comparison(
        difference=difference,
        p=p,
        p_holm=p,
        mcnemar=exact,
        worse=fmean(worse for worse, _ in flipped),
        better=fmean(better for _, better in flipped),
        units=len(before.right),
        agreement=100 * fmean(float((run.answers == before.answers).mean()) for run in runs),
        detectable=detectable(difference.error),
        verdict="not distinguishable",  # decided when the p values of all benchmarks are known
        sign=TASKS[task].sign,
    )


def rel_interval(entry: Entry, baseline: Entry, tasks: Sequence[str], draws: Draws) -> Interval | None:
    """Return the interval of Rel minus 100 over `tasks`; None without paired samples."""
    drawn, value = draws.ratio(entry, baseline, tasks), _rel(entry, baseline, tasks)
    return None if drawn is None or value is None else interval(value - 100, drawn - 100)


def against_random(
    entry: Entry, control: Entry, baseline: Entry, tasks: Sequence[str], draws: Draws
) -> tuple[Against | None, Mapping[str, Against]]:
    """Return Rel over `tasks`, and each benchmark's score, minus those of the random control."""
    differences = {}
    for task in entry.tasks:
        pair = draws.pair(entry, control, task)
        if pair is not None and task in control.tasks and baseline.scores.get(task):
            differences[task] = interval(entry.scores[task] - control.scores[task], pair[0] - pair[1])
    corrected = holm([difference.p for difference in differences.values()])
    cells = {
        task: Against(control.label, difference, _real(task, difference, p, "beats random", "below random"))
        for (task, difference), p in zip(differences.items(), corrected, strict=True)
    }
    rel = rel_difference(entry, control, baseline, tasks, draws)
    if rel is None:
        return None, cells
    return Against(control.label, rel, verdict(rel, "beats random", "below random")), cells


def rel_difference(entry: Entry, other: Entry, baseline: Entry, tasks: Sequence[str], draws: Draws) -> Interval | None:
    """Return the interval of an entry's Rel minus another's, on the same documents; None if they cannot be paired."""
    entry_rel, other_rel = (draws.ratio(either, baseline, tasks) for either in (entry, other))
    values = [_rel(either, baseline, tasks) for either in (entry, other)]
    if entry_rel is None or other_rel is None or values[0] is None or values[1] is None:
        return None
    return interval(values[0] - values[1], entry_rel - other_rel)


def _rel(entry: Entry, baseline: Entry, tasks: Sequence[str]) -> float | None:
    return rel(entry.scores, {task: baseline.scores[task] for task in tasks})
