"""The ten benchmarks: their lmms-eval tasks and columns, and how a score is read and put on the paper's scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

Group = Literal["knowledge QA", "text-centric", "comprehensive"]
GROUPS: tuple[Group, ...] = ("knowledge QA", "text-centric", "comprehensive")
"""The groups of arXiv 2512.07580, section 7. Which benchmark is in which group is each benchmark's own entry below."""


@dataclass(frozen=True)
class Benchmark:
    """One column of the paper's tables.

    Args:
        name: the column's name, as in the paper.
        narrow: a short name for a narrow terminal.
        tasks: lmms-eval tasks that measure it, variants included; the first one scores without a judge.
        metrics: the metrics whose sum is the score.
        group: the group that it counts in; None for a task that is none of the ten benchmarks.
        factor: the sum of the metrics times this factor is on the paper's scale.
        best_score: the best possible score on that scale.
        kind: how a sample's score is read from the samples file (`lmms_prune.leaderboard.samples`).
        binary: whether the score is the share of units (questions, circular groups) that are right.
    """

    name: str
    narrow: str
    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    group: Group | None
    factor: float = 100.0
    best_score: float = 100.0
    kind: Literal["plain", "mme", "pope", "mmbench"] = "plain"
    binary: bool = False


# POPE is the F1 score: printed values such as 25.2 cannot be an accuracy, which constant answers keep at 50.
# OCRBench divides by 1000 whatever the number of questions; `score` corrects that. MMBench's numbers are in percent already.
BENCHMARKS = (
    Benchmark(
        "MME",
        "MME",
        ("mme",),
        ("mme_perception_score", "mme_cognition_score"),
        "comprehensive",
        factor=1.0,
        best_score=2800.0,
        kind="mme",
    ),
    Benchmark("SQA", "SQA", ("scienceqa_img",), ("exact_match",), "knowledge QA", binary=True),
    Benchmark(
        "POPE",
        "POPE",
        ("pope", "prune_pope", "pope_adv", "pope_pop", "pope_random"),
        ("pope_f1_score",),
        "comprehensive",
        kind="pope",
    ),
    Benchmark("TextVQA", "TVQA", ("textvqa_val", "prune_textvqa_ocr"), ("exact_match",), "text-centric"),
    Benchmark(
        "MMB",
        "MMB",
        ("mmbench_en_dev_static", "prune_mmbench_en", "mmbench_en_dev"),
        ("gpt_eval_score",),
        "comprehensive",
        factor=1.0,
        kind="mmbench",
        binary=True,
    ),
    Benchmark(
        "MMB-CN",
        "CN",
        ("mmbench_cn_dev_static", "prune_mmbench_cn", "mmbench_cn_dev"),
        ("gpt_eval_score",),
        "comprehensive",
        factor=1.0,
        kind="mmbench",
        binary=True,
    ),
    Benchmark("GQA", "GQA", ("gqa",), ("exact_match",), "knowledge QA", binary=True),
    Benchmark("InfoVQA", "Info", ("infovqa_val",), ("anls",), "text-centric"),
    Benchmark("DocVQA", "Doc", ("docvqa_val",), ("anls",), "text-centric"),
    Benchmark("OCRBench", "OCR", ("ocrbench",), ("ocrbench_accuracy",), "text-centric", binary=True),
)
TASKS: dict[str, Benchmark] = {task: benchmark for benchmark in BENCHMARKS for task in benchmark.tasks}
JUDGED = frozenset({"mmbench_en_dev", "mmbench_cn_dev"})
"""Tasks for which lmms-eval may ask a judge what an answer means; we score their samples by rules alone."""
ORDER = {task: index for index, task in enumerate(TASKS)}
_OWN = frozenset(TASKS)


def add_plain(task: str, metric: str) -> None:
    """Make any other task a plain column: the mean of one metric from 0 to 1, in percent. Such columns come last, by name."""
    if task not in TASKS:
        TASKS[task] = Benchmark(task, task, (task,), (metric,), None)
        others = sorted(set(TASKS) - _OWN)
        ORDER.update({name: len(_OWN) + place for place, name in enumerate(others)})


def mean_metrics(metric_list: Any) -> list[str]:
    """Return the metrics of a task that are means of scores of single documents, higher being better.

    Args:
        metric_list: as in a task's YAML, or in the ``configs`` of a results file.
    """
    entries = [entry for entry in metric_list if isinstance(entry, Mapping)] if isinstance(metric_list, list) else []
    return [
        str(entry["metric"])
        for entry in entries
        if "metric" in entry and entry.get("aggregation") == "mean" and entry.get("higher_is_better") is True
    ]


def plain_metric(results: Mapping[str, Any], task: str) -> str | None:
    """Return the one metric that makes a task a plain column; None if there is none, or several."""
    config, recorded = results["configs"].get(task) or {}, results["results"].get(task, {})
    metrics = mean_metrics(config.get("metric_list"))
    if len(metrics) != 1:
        return None
    value = recorded.get(f"{metrics[0]},none")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return metrics[0] if number and 0 <= value <= 1 else None


def named(name: str) -> tuple[str, ...]:
    """Return the tasks of a benchmark or task name, case-insensitively; empty if the name is unknown."""
    lowered = name.strip().lower()
    for benchmark in BENCHMARKS:
        if lowered in (benchmark.name.lower(), benchmark.narrow.lower()):
            return benchmark.tasks
    return tuple(task for task in TASKS if task.lower() == lowered)


def score(results: Mapping[str, Any], task: str) -> float | None:
    """Return a benchmark's score on the paper's scale from the content of a results file; None if absent or faulty (`fault`)."""
    metrics = _metrics(results, task).values()
    if fault(results, task) or any(value is None for value in metrics):
        return None
    return _figure(results, task)


def fault(results: Mapping[str, Any], task: str) -> str:
    """Say why a recorded score is impossible for a benchmark (not finite, or outside its scale); "" if it is possible."""
    benchmark = TASKS[task]
    for metric, value in _metrics(results, task).items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
            return f"{metric} is {value!r}, which is no finite number"
        if value < 0:
            return f"{metric} is {value:g}, where the least is 0"
    # The harness sums floats, so a perfect score may exceed the best one by rounding.
    if not _figure(results, task) <= benchmark.best_score * (1 + 1e-9):
        recorded = " and ".join(f"{metric} is {value:g}" for metric, value in _metrics(results, task).items() if value)
        return f"{recorded}, more than the best score"
    return ""


def _metrics(results: Mapping[str, Any], task: str) -> dict[str, Any]:
    recorded = results["results"].get(task, {})
    return {metric: recorded.get(f"{metric},none") for metric in TASKS[task].metrics}


def _figure(results: Mapping[str, Any], task: str) -> float:
    """Sum the recorded metrics, on the paper's scale."""
    total = TASKS[task].factor * sum(value for value in _metrics(results, task).values() if value is not None)
    return float(total * 1000 / max(1, documents(results, task)[0]) if task == "ocrbench" else total)


def documents(results: Mapping[str, Any], task: str) -> tuple[int, int]:
    """Return how many documents of a task were answered, and how many the task has."""
    counts = results["n-samples"][task]
    return int(counts["effective"]), int(counts["original"])


def acc(scores: Mapping[str, float | None]) -> float | None:
    """The paper's Acc: the mean over the benchmarks in percent, MME's total of 2800 as 100 %; None if one is missing."""
    shares = [None if value is None else 100 * value / TASKS[task].best_score for task, value in scores.items()]
    return _mean(shares)


def rel(scores: Mapping[str, float | None], unpruned: Mapping[str, float | None]) -> float | None:
    """The paper's Rel: the mean over the benchmarks of the share of the unpruned score, in percent.

    Args:
        scores: by task.
        unpruned: by task; a benchmark on which the unpruned model scores nothing cannot be compared and does not count.

    Returns:
        None if no benchmark counts, or if a counted one is missing in `scores`.
    """
    counted = {task: unpruned_score for task, unpruned_score in unpruned.items() if unpruned_score}
    shares = [
        None if (value := scores.get(task)) is None else 100 * value / unpruned_score
        for task, unpruned_score in counted.items()
    ]
    return _mean(shares)


@dataclass(frozen=True)
class GroupMean:
    """Acc and Rel over the benchmarks of one group; None as for `acc` and `rel`."""

    acc: float | None
    rel: float | None = None


def group_means(
    scores: Mapping[str, float | None], unpruned: Mapping[str, float | None] | None = None
) -> dict[str, GroupMean]:
    """Return the means of each group that has a benchmark.

    Args:
        scores: by task; None for a missing one.
        unpruned: the baseline's scores; None without a baseline.
    """
    means: dict[str, GroupMean] = {}
    for group in GROUPS:
        own = {task: value for task, value in scores.items() if TASKS[task].group == group}
        reference = {task: value for task, value in (unpruned or {}).items() if TASKS[task].group == group}
        if own:
            means[group] = GroupMean(acc(own), rel(own, reference))
    return means


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
