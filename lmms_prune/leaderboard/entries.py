"""Leaderboard rows before comparison: runs that differ only in seed, with their samples and their cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from statistics import fmean, stdev

from lmms_prune.errors import ScheduleError
from lmms_prune.leaderboard.benchmarks import JUDGED, ORDER, TASKS
from lmms_prune.leaderboard.reader import SamplesReader
from lmms_prune.leaderboard.records import Problem, RunRecord, TaskRecord
from lmms_prune.leaderboard.rows import CONTROL, ORACLE, PRUNED, STOCK, UNPRUNED
from lmms_prune.leaderboard.samples import NoDocumentScoresError, Samples, SamplesError
from lmms_prune.record.accounting import TokenTotals
from lmms_prune.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Entry:
    """A leaderboard row before comparison: all runs that differ only in seed.

    Args:
        runs: runs that differ only in seed.
        label: the schedule, with the settings that distinguish it from other entries of the same schedule.
        kind: UNPRUNED, CONTROL (control methods only), ORACLE (a method reads the right answers), PRUNED, or STOCK (a model
            that is not this plugin's).
        samples: by task, one per run; only tasks whose samples all could be read and give the recorded scores.
        accounting: the cost of the documents of all tasks; None if a part was not measured.
        flaws: samples that are absent, unusable or empty.
        faults: contradictions: scores that the samples contradict, or that the benchmark cannot have.
    """

    runs: tuple[RunRecord, ...]
    label: str
    kind: str
    samples: Mapping[str, tuple[Samples, ...]]
    accounting: TokenTotals | None
    flaws: tuple[str, ...]
    faults: tuple[str, ...]

    @property
    def schedule(self) -> str | None:
        return self.runs[0].schedule

    @property
    def key(self) -> str:
        """Return a text that is equal for equal settings, seed excluded."""
        return "|".join(self.runs[0].key(("seed",)))

    @property
    def tasks(self) -> list[str]:
        """Return the tasks that every run has a score of."""
        shared = set.intersection(
            *({name for name, task in run.tasks.items() if task.score is not None} for run in self.runs)
        )
        return sorted(shared, key=ORDER.__getitem__)

    def each(self, task: str) -> list[float]:
        """Return the score of each run."""
        scores = [run.tasks[task].score for run in self.runs]
        return [value for value in scores if value is not None]

    @property
    def scores(self) -> dict[str, float]:
        """Return the mean score over the seeds, by task."""
        return {task: fmean(self.each(task)) for task in self.tasks}

    @property
    def avg_visual_tokens(self) -> float | None:
        """Return the measured budget: visual tokens, averaged over the decoder layers."""
        return None if self.accounting is None else self.accounting.avg_visual_tokens

    @property
    def loses_tokens(self) -> bool:
        """Tell whether the cost was measured and some visual tokens were dropped."""
        totals = self.accounting
        return totals is not None and totals.avg_visual_tokens < totals.original_visual_tokens

    @property
    def is_random(self) -> bool:
        """Tell whether only random draws decide which tokens are kept, and some are dropped."""
        return set(kinds_of(self.schedule)) == {"random"} and self.loses_tokens

    @property
    def is_blind(self) -> bool:
        """Tell whether the decoder saw no visual token."""
        return self.kind == CONTROL and self.avg_visual_tokens == 0


def deviation(values: Sequence[float]) -> float | None:
    """Return the standard deviation over seeds; None for a single one."""
    return stdev(values) if len(values) > 1 else None


def entries(records: Sequence[RunRecord], problems: list[Problem], reader: SamplesReader) -> list[Entry]:
    """Group runs of one model that differ only in seed into entries; problems with samples are added to `problems`."""
    pools: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in records:
        if record.tasks:
            pools.setdefault(record.key(("seed",)), []).append(record)
    labels = _labels([pool[0] for pool in pools.values()])
    return [_entry(pool, label, problems, reader) for pool, label in zip(pools.values(), labels, strict=True)]


def _entry(pool: list[RunRecord], label: str, problems: list[Problem], reader: SamplesReader) -> Entry:
    runs = tuple(sorted(pool, key=lambda run: run.seed))
    usable: dict[str, list[Samples]] = {}
    flaws, faults = _Remarks(), _Remarks()
    accounted: list[TokenTotals | None] = []
    for run in runs:
        for name, task in run.tasks.items():
            column = TASKS[name].name
            accounted.append(task.accounting)
            if task.fault:
                faults.add("a score that the benchmark cannot have", f"{column} ({task.fault})")
            if task.samples is None:
                flaws.add("no samples logged", column)
                continue
            try:
                samples = reader.read(task.samples, TASKS[name])
            except NoDocumentScoresError:
                flaws.add("the task logs no score of each document, so it has no interval", column)
                continue
            except (SamplesError, OSError) as error:
                reason = getattr(error, "strerror", None) or str(error).removeprefix(str(task.samples)).lstrip(":, ")
                problems.append(Problem(str(task.samples), reason))
                flaws.add("samples cannot be used", column)
                continue
            accounted[-1] = samples.accounting
            if _agree(task, samples, column, flaws, faults):
                usable.setdefault(name, []).append(samples)
            if samples.empty and not run.ours:
                flaws.add("empty answers, which may be failures", f"{column} ({samples.empty})")
    complete = {name: tuple(samples) for name, samples in usable.items() if len(samples) == len(runs)}
    measured = [totals for totals in accounted if totals is not None]
    total = reduce(add, measured) if runs[0].ours and len(measured) == len(accounted) else None
    return Entry(runs, label, _kind(runs[0]), complete, total, flaws.texts(), faults.texts())


def _agree(task: TaskRecord, samples: Samples, column: str, flaws: _Remarks, faults: _Remarks) -> bool:
    """Tell whether a task's samples give the recorded score; if not, add the reason to `flaws` or `faults`."""
    if samples.logged != task.answered:
        remark = "samples are missing" if samples.logged < task.answered else "more samples than documents"
        faults.add(remark, f"{column} ({samples.logged} of {task.answered})")
    elif task.score is None:
        if not task.fault:
            faults.add("no score, though there are samples", f"{column} (they give {samples.score:.2f})")
    elif not abs(samples.score - task.score) <= TASKS[task.task].tolerance:
        if TASKS[task.task].aggregated:
            flaws.add("the score is no mean over the documents, so it has no interval", column)
            return False
        remarks = flaws if task.task in JUDGED else faults
        remarks.add("the samples give another score", f"{column} ({samples.score:.2f} instead of {task.score:.2f})")
    else:
        return True
    return False


class _Remarks:
    """Remarks on a row, each with the benchmarks that it concerns."""

    def __init__(self) -> None:
        self._benchmarks: dict[str, dict[str, None]] = {}

    def add(self, what: str, benchmark: str) -> None:
        self._benchmarks.setdefault(what, {})[benchmark] = None

    def texts(self) -> tuple[str, ...]:
        return tuple(f"{what}: {', '.join(names)}" for what, names in self._benchmarks.items())


def kinds_of(schedule: str | None) -> dict[str, str]:
    """Return the methods of a schedule's stages with their kinds; empty if this version cannot parse it."""
    try:
        return {stage.method: stage.spec.kind for stage in Schedule.parse(schedule or "none").stages}
    except ScheduleError:
        return {}


def _kind(run: RunRecord) -> str:
    if not run.ours:
        return STOCK
    if run.schedule == "none":
        return UNPRUNED
    kinds = set(kinds_of(run.schedule).values())
    return ORACLE if "oracle" in kinds else CONTROL if kinds == {"control"} else PRUNED


def _labels(records: Sequence[RunRecord]) -> list[str]:
    """Label each run by its schedule; runs of the same schedule also by the settings in which they differ."""
    names = [record.schedule or record.wrapper for record in records]
    labels = []
    for record, name in zip(records, names, strict=True):
        same = [other.settings for other, other_name in zip(records, names, strict=True) if other_name == name]
        differing = [
            f"{key}={record.settings[key]}"
            for key in sorted(set(record.settings) - {"seed"})
            if len({settings.get(key) for settings in same}) > 1
        ]
        labels.append(f"{name} ({', '.join(differing)})" if differing else name)
    return labels
