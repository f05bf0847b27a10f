"""Scores answers again with their tasks' own scorers, and compares the sum with the recorded score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmms_prune.leaderboard.benchmarks import JUDGED
from lmms_prune.leaderboard.samples import Samples
from lmms_prune.leaderboard.verify.evidence import RecordedSample, RecordedTask
from lmms_prune.leaderboard.verify.findings import Doubt, NotRecordedError, close, doubts_of

if TYPE_CHECKING:
    from lmms_prune.harness.scoring import TaskScorer, UnscorableError


class Rescoring:
    """The scorers of tasks, each made once.

    Args:
        data: whether to read the benchmarks, by which questions and references are verified too.
        include: a folder of further task YAMLs.
    """

    def __init__(self, data: bool = False, include: Path | None = None) -> None:
        self._data, self._include = data, include
        self._scorers: dict[tuple[str, str], TaskScorer | UnscorableError] = {}

    def prepare(self, tasks: Iterable[tuple[str, str]]) -> None:
        """Make the scorers of tasks, given with the model's name in lmms-eval, on which prompts depend.

        Raises:
            ArgumentError: the benchmarks cannot be read.
        """
        wanted = [key for key in dict.fromkeys(tasks) if key not in self._scorers]
        if not wanted:
            return
        from lmms_prune.harness.scoring import scorers

        # Without data, nothing depends on the model.
        models = dict.fromkeys(model for _, model in wanted) if self._data else [wanted[0][1]]
        for model in models:
            names = list(dict.fromkeys(name for name, other in wanted if other == model or not self._data))
            for name, scorer in scorers(names, model, self._include, self._data).items():
                self._scorers |= {
                    key: scorer for key in wanted if key[0] == name and (key[1] == model or not self._data)
                }

    def scored_again(self, task: RecordedTask) -> list[Doubt]:
        """Compare the scores of a task's samples with those that its scorer gives their answers."""
        from lmms_prune.harness.scoring import UnscorableError

        scorer = self._scorers[task.name, task.run.wrapper]
        if isinstance(scorer, UnscorableError):
            return [Doubt(f"{scorer}", contradicted=False)]
        chosen: TaskScorer = scorer

        def contradiction(sample: RecordedSample) -> str:
            try:
                return _contradiction(sample, chosen)
            except UnscorableError as error:
                raise NotRecordedError(str(error)) from error

        return doubts_of(task.samples, lambda sample: sample.name, contradiction)


def _contradiction(sample: RecordedSample, scorer: TaskScorer) -> str:
    answer = sample.answer
    document = scorer.document(sample.logged)
    for name, text in scorer.recorded_as(document).items():
        if sample.logged.get(name) != text:
            return f"its {name} is {_short(sample.logged.get(name))}, the benchmark's {_short(text)}"
    metrics = scorer.metrics(document, answer)
    for name, derived in metrics.items():
        if not _equal(sample.logged.get(name), derived):
            text = (
                f"{name} is {_short(sample.logged.get(name))}, but the answer {_short(answer)} scores {_short(derived)}"
            )
            if not scorer.decisive:
                raise NotRecordedError("its scorer may read more than is recorded; --data reads the benchmark")
            return text
    return ""


def _equal(recorded: Any, derived: Any) -> bool:
    """Tell whether two JSON values are equal except for rounding."""
    if isinstance(derived, Mapping) and isinstance(recorded, Mapping):
        return recorded.keys() >= derived.keys() and all(_equal(recorded[name], derived[name]) for name in derived)
    if isinstance(derived, (list, tuple)) and isinstance(recorded, (list, tuple)):
        return len(recorded) == len(derived) and all(map(_equal, recorded, derived))
    if isinstance(derived, float) and isnan(derived):
        return recorded is None or recorded != recorded or str(recorded).lower() in ("nan", "none")
    if isinstance(derived, (int, float)) and isinstance(recorded, (int, float)):
        return close(recorded, derived)
    return bool(recorded == derived)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def totals_follow(task: RecordedTask, scored: Samples | None) -> list[Doubt]:
    """Compare the recorded score of a task with the one that its samples give."""
    record = task.record
    if record.fault:
        return [Doubt(record.fault, contradicted=True)]
    if scored is None or record.samples is None:
        return [Doubt("no samples logged", contradicted=False)]
    if scored.logged != record.answered:
        return [Doubt(f"{scored.logged} samples of {record.answered} answered documents", contradicted=True)]
    if record.score is None:
        return [Doubt(f"no score, though the samples give {scored.score:.2f}", contradicted=True)]
    if not abs(scored.score - record.score) <= 1e-6:
        judged = task.name in JUDGED
        return [Doubt(f"a score of {record.score:.2f}; its samples give {scored.score:.2f}", contradicted=not judged)]
    return []


def scored_tasks(runs: Sequence[Any]) -> list[tuple[str, str]]:
    """Return the tasks of runs that have samples, each with the model's name in lmms-eval."""
    return [(name, run.wrapper) for run in runs for name, record in run.tasks.items() if record.samples is not None]
