"""The ten benchmarks of the paper and others known by name: tasks, columns, and how a score is read and put on its scale."""

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
    """One column of the tables: one of the paper's ten, another one known by name, or any other task of lmms-eval.

    Args:
        name: the column's name, as in the paper; a task's name with an arrow where lower is better.
        narrow: a short name for a narrow terminal.
        tasks: lmms-eval tasks that measure it, variants included; the first one scores without a judge.
        metrics: the metrics whose sum is the score.
        group: the group that it counts in; None for a task that is none of the ten benchmarks.
        factor: the sum of the metrics times this factor is on the paper's scale.
        best_score: the best possible score on that scale; infinite if it is not known.
        kind: how a sample's score is read from the samples file (`lmms_prune.leaderboard.samples`).
        binary: whether the score is the share of units (questions, circular groups) that are right.
        higher_is_better: as the task's YAML says.
        filters: how many of lmms-eval's filters score each document; with several, a sample's line names none.
        tolerance: how much the recorded score may differ from that of the samples, where lmms-eval rounds it.
        aggregated: whether the task's own code makes the score, so that it need not be the mean over the documents.
        note: what a reader must know of a column that is not known by name.
    """

    name: str
    narrow: str
    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    group: Group | None
    factor: float = 100.0
    best_score: float = 100.0
    kind: Literal["plain", "mme", "pope", "mmbench", "box", "mmmu", "categories", "any"] = "plain"
    binary: bool = False
    higher_is_better: bool = True
    filters: int = 1
    tolerance: float = 1e-6
    aggregated: bool = False
    note: str = ""

    @property
    def counts(self) -> bool:
        """Tell whether it counts in the paper's Acc and Rel."""
        return self.group is not None

    @property
    def sign(self) -> int:
        """Return 1 if higher is better, and -1 if lower is."""
        return 1 if self.higher_is_better else -1

    @property
    def scaled(self) -> bool:
        """Tell whether the best score is known, so that half of it separates right from wrong."""
        return isfinite(self.best_score)


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
_REC = ("val", "test", "testA", "testB")
# Where a YAML has several metrics, this is the one that papers on pruning print; ACC@0.5 is the usual score of RefCOCO.
FURTHER = (
    *(
        Benchmark(
            name,
            narrow,
            tuple(f"{name.lower()}_bbox_rec_{split}" for split in _REC),
            ("refcoco_ACC@0.5",),
            None,
            kind="box",
            binary=True,
        )
        for name, narrow in (("RefCOCO", "Ref"), ("RefCOCO+", "Ref+"), ("RefCOCOg", "Refg"))
    ),
    Benchmark("ChartQA", "Chart", ("chartqa", "chartqa_lite"), ("relaxed_overall",), None, binary=True),
    Benchmark("AI2D", "AI2D", ("ai2d", "ai2d_lite", "ai2d_no_mask"), ("exact_match",), None, binary=True),
    Benchmark("MMStar", "Star", ("mmstar",), ("average",), None, kind="categories"),
    # lmms-eval rounds MMMU's accuracy to five decimals.
    Benchmark("MMMU", "MMMU", ("mmmu_val",), ("mmmu_acc",), None, kind="mmmu", binary=True, tolerance=6e-4),
)
"""Benchmarks that are none of the paper's ten, and known by name."""
TASKS: dict[str, Benchmark] = {task: benchmark for benchmark in (*BENCHMARKS, *FURTHER) for task in benchmark.tasks}
"""By task, its column: those above, and every other task that was read (`lmms_prune.leaderboard.other_tasks`)."""
JUDGED = frozenset({"mmbench_en_dev", "mmbench_cn_dev"})
"""Tasks for which lmms-eval may ask a judge what an answer means; we score their samples by rules alone."""
ORDER = {task: index for index, task in enumerate(TASKS)}
NAMED = frozenset(TASKS)


def named(name: str) -> tuple[str, ...]:
    """Return the tasks of a benchmark or task name, case-insensitively; empty if the name is unknown."""
    lowered = name.strip().lower()
    for benchmark in (*BENCHMARKS, *FURTHER):
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
        if value < 0 and benchmark.scaled:
            return f"{metric} is {value:g}, where the least is 0"
    # The harness sums floats, so a perfect score may exceed the best one by rounding.
    if not _figure(results, task) <= benchmark.best_score * (1 + 1e-9):
        recorded = " and ".join(f"{metric} is {value:g}" for metric, value in _metrics(results, task).items() if value)
        return f"{recorded}, more than the best score"
    return ""


def _metrics(results: Mapping[str, Any], task: str) -> dict[str, Any]:
    recorded = results["results"].get(task, {})
    return {metric: next(iter(recorded_values(recorded, metric).values()), None) for metric in TASKS[task].metrics}


def recorded_values(recorded: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Return a metric's values by lmms-eval's filter, "none" first: ``exact_match,flexible-extract`` is such a value."""
    values = {name.split(",", 1)[1]: value for name, value in recorded.items() if name.rpartition(",")[0] == metric}
    return dict(sorted(values.items(), key=lambda item: item[0] != "none"))


def _figure(results: Mapping[str, Any], task: str) -> float:
    """Sum the recorded metrics, on the paper's scale."""
    total = TASKS[task].factor * sum(value for value in _metrics(results, task).values() if value is not None)
    return float(total * 1000 / max(1, documents(results, task)[0]) if task == "ocrbench" else total)


def documents(results: Mapping[str, Any], task: str) -> tuple[int, int]:
    """Return how many documents of a task were answered, and how many the task has."""
    counts = results["n-samples"][task]
    return int(counts["effective"]), int(counts["original"])


def acc(scores: Mapping[str, float | None]) -> float | None:
    """The paper's Acc: the mean over the benchmarks in percent, MME's total of 2800 as 100 %.

    Returns:
        None if a score is missing, or if the best score of a benchmark is not known.
    """
    if not all(TASKS[task].scaled for task in scores):
        return None
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
