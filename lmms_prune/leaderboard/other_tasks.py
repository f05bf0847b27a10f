"""Columns of tasks that are not known by name: metric and direction come from the task's YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any

from lmms_prune.leaderboard.benchmarks import NAMED, ORDER, TASKS, Benchmark, recorded_values


@dataclass(frozen=True)
class Metric:
    """One entry of a task's ``metric_list``.

    Args:
        name: the metric's name.
        higher_is_better: as the YAML says; true if it does not say.
        mean: whether the score is the mean over the documents; otherwise the task's own code makes it.
    """

    name: str
    higher_is_better: bool
    mean: bool


def metrics_of(metric_list: Any) -> list[Metric]:
    """Return the metrics of a task, those first whose score is the mean over the documents.

    Args:
        metric_list: as in a task's YAML, or in the ``configs`` of a results file.
    """
    entries = [entry for entry in metric_list if isinstance(entry, Mapping)] if isinstance(metric_list, list) else []
    metrics = [
        Metric(str(entry["metric"]), entry.get("higher_is_better") is not False, entry.get("aggregation") == "mean")
        for entry in entries
        if "metric" in entry
    ]
    return sorted(metrics, key=lambda metric: not metric.mean)


def column(results: Mapping[str, Any], task: str) -> Benchmark | str:
    """Return the column of a task that is not known by name, or the reason why it cannot have one.

    It is the first metric, in the order of `metrics_of`, that has a number in the content of a results file. Scores from 0 to
    1 are printed in percent, others as they are.
    """
    metrics = metrics_of((results["configs"].get(task) or {}).get("metric_list"))
    if not metrics:
        return "its YAML names no metric (metric_list)"
    recorded = results["results"].get(task, {})
    values = {metric.name: recorded_values(recorded, metric.name) for metric in metrics}
    numbers = [metric for metric in metrics if any(map(_is_number, values[metric.name].values()))]
    if not numbers:
        listed = "; ".join(
            f"{name} is {next(iter(by_filter.values()), 'absent')!r}" for name, by_filter in values.items()
        )
        return f"it has no score that is a number ({listed})"
    metric = numbers[0]
    value = next(iter(values[metric.name].values()))
    percent = not _is_number(value) or 0 <= value <= 1
    others = [other.name for other in numbers[1:]]
    return Benchmark(
        task if metric.higher_is_better else f"{task} ↓",
        task,
        (task,),
        (metric.name,),
        None,
        factor=100.0 if percent else 1.0,
        best_score=100.0 if percent else inf,
        kind="any",
        higher_is_better=metric.higher_is_better,
        filters=len(values[metric.name]),
        aggregated=not metric.mean,
        note=f"{task} is {metric.name}, the first of its metrics; the others: {', '.join(others)}" if others else "",
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def register(content: Mapping[str, Any]) -> dict[str, str]:
    """Give a column to every task of a results file that has none yet. Such columns come last, by name.

    Returns:
        by task, why it cannot be a column.
    """
    reasons: dict[str, str] = {}
    for task in content["results"]:
        if task in NAMED or (content.get("group_subtasks") or {}).get(task):
            continue
        candidate, known = column(content, task), TASKS.get(task)
        if isinstance(candidate, str):
            reasons |= {} if known else {task: candidate}
        elif known is None or (known.metrics, known.sign) != (candidate.metrics, candidate.sign):
            TASKS[task] = candidate
        elif known.scaled and not candidate.scaled:
            # A score beyond 1 shows that the metric is no share, in whichever file it is.
            TASKS[task] = replace(known, factor=candidate.factor, best_score=candidate.best_score)
    for place, task in enumerate(sorted(set(TASKS) - NAMED)):
        ORDER[task] = len(NAMED) + place
    return reasons
