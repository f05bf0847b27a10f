"""The finished leaderboard: models, budgets, rows and cells. Every format prints only this.

Scores are on the paper's scale, shares and ratios in percent, tokens, bytes and FLOPs per document.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lmms_prune.leaderboard.benchmarks import TASKS, GroupMean
from lmms_prune.leaderboard.interval import Interval
from lmms_prune.leaderboard.published import PublishedCost, PublishedRow
from lmms_prune.leaderboard.records import Problem, RunRecord

UNPRUNED, CONTROL, ORACLE, PRUNED, STOCK = "unpruned", "control", "oracle", "pruned", "stock"
"""The kinds of rows: see `TableRow`."""
ALPHA = 0.05
"""A change is real if its p value, corrected for the row's benchmarks by Holm's method, is below this. Nothing else is."""


@dataclass(frozen=True)
class Against:
    """A difference to another row, with a verdict: "not distinguishable" unless it is real.

    Of Rel that is one comparison, whose interval excludes zero; of a benchmark it is corrected for the row's benchmarks.
    """

    other: str
    difference: Interval
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """Comparison of one benchmark of a row with its baseline, on the same documents.

    Args:
        difference: row minus baseline.
        p: p value of no difference: McNemar's exact test if the score is a share of right answers and each side is one
            run, else by resampling.
        p_holm: `p` corrected for the number of benchmarks of the row.
        mcnemar: McNemar's p value of right and wrong answers, for any kind of score; None over several seeds.
        worse, better: units that flipped from right to wrong, and from wrong to right; mean over the seeds.
        units: number of resampled units: documents, MME's images, or MMBench's circular groups.
        agreement: documents with the same answer as in the baseline, in percent.
        detectable: the smallest true difference that would be found with 80 % power at a two-sided 5 %.
        verdict: "better than unpruned" or "worse than unpruned" if the change is real (see `ALPHA`), else "not
            distinguishable"; another baseline by its label.
        sign: -1 where lower is better.
    """

    difference: Interval
    p: float
    p_holm: float
    mcnemar: float | None
    worse: float
    better: float
    units: int
    agreement: float
    detectable: float | None
    verdict: str
    sign: int = 1

    @property
    def real(self) -> bool:
        """Tell whether the change is real (see `ALPHA`)."""
        return self.p_holm < ALPHA

    @property
    def mark(self) -> str:
        """Return ▲ or ▼ for a real change, △ or ▽ for one that Holm's correction takes away, else ""."""
        up = self.sign * self.difference.value > 0
        if self.real:
            return "▲" if up else "▼"
        return ("△" if up else "▽") if self.p < ALPHA else ""


@dataclass(frozen=True)
class ScoreCell:
    """One benchmark of a row.

    Args:
        score, sd: mean and standard deviation over the seeds.
        unpruned: the baseline's score. retention: the score relative to it.
        above_blind: (score - blind) / (baseline - blind).
        comparison: comparison with the baseline; None without samples of both.
        random: comparison with the random control at the same measured budget.
        published: the paper's value for the same model and schedule.
        unlike: how task and protocol differ from the paper's row, a short text each; only without any are the two compared.
        extras: POPE's accuracy, precision, recall and yes-rate, mean over the seeds.
    """

    score: float
    sd: float | None = None
    unpruned: float | None = None
    retention: float | None = None
    above_blind: float | None = None
    comparison: Comparison | None = None
    random: Against | None = None
    published: float | None = None
    unlike: tuple[str, ...] = ()
    extras: Mapping[str, float] = field(default_factory=dict)

    @property
    def delta(self) -> float | None:
        """Return our score minus the published one; None if there is none, or if the protocols differ."""
        return None if self.published is None or self.unlike else self.score - self.published


@dataclass(frozen=True)
class Cost:
    """Measured cost per document, absolute and relative to the baseline.

    Args:
        avg_visual_tokens: the measured budget: visual tokens, averaged over decoder layers and documents with an image.
        original_tokens: visual tokens of these images before pruning.
        kv_mib: size of the prefill's KV cache. prefill_tflops: the decoder's prefill, selection included.
        encoder_tflops, decode_tflops: the vision encoder, and all decode steps.
        samples_per_second: as lmms-eval recorded it: generation only, at the run's batch size, first process only.
        samples_per_second_low, samples_per_second_high: 95 % interval over the row's runs; None of a single run. Tables and
            the page print no speed without it.
        share_speed: None unless all circumstances that change times are equal; `no_share_speed` then has the reason, and
            `unlike` the reason in a word.
        share_speed_low, share_speed_high: 95 % interval of the share; None unless both speeds have one.
        peak_gib: memory at the peak of the run that used most, weights included. peak_of: "GPU", or "process" (resident set size).
    """

    avg_visual_tokens: float | None = None
    original_tokens: float | None = None
    kv_mib: float | None = None
    prefill_tflops: float | None = None
    encoder_tflops: float | None = None
    decode_tflops: float | None = None
    samples_per_second: float | None = None
    samples_per_second_low: float | None = None
    samples_per_second_high: float | None = None
    device: str = ""
    share_tokens: float | None = None
    share_kv: float | None = None
    share_flops: float | None = None
    share_speed: float | None = None
    share_speed_low: float | None = None
    share_speed_high: float | None = None
    no_share_speed: str = ""
    unlike: str = ""
    peak_gib: float | None = None
    peak_of: str = ""

    @property
    def has_speed(self) -> bool:
        """Return whether there is a speed with an interval."""
        return self.samples_per_second_low is not None


@dataclass(frozen=True)
class TableRow:
    """One row of the leaderboard: a schedule, over one or more seeds.

    Args:
        label: the executed schedule, with the settings that distinguish it from other rows of the same schedule.
        kind: UNPRUNED, CONTROL (control methods only), ORACLE (a method reads the right answers), PRUNED, or STOCK (a model
            that is not this plugin's).
        seeds: the seeds of its runs.
        cells: scores by task; a benchmark without a score has no cell.
        missing: tasks of the table that the row has no score of.
        acc, rel: as the paper defines them; None if a benchmark is missing. rel_sd: standard deviation over the seeds.
        rel_interval: interval of Rel minus 100.
        groups: Acc and Rel by group of benchmarks.
        uncounted: tasks on which the baseline scores 0; they cannot count in a mean of ratios.
        above_blind: mean over the tasks on which the baseline is distinguishably better than blind.
        random: comparison of Rel with the random control.
        baseline: label of the row it is compared with; None for a baseline itself.
        marks: reasons why the row is not directly comparable.
        faults: the marks that are contradictions; the gate passes neither such a row nor one with such a baseline.
        unverified: numbers that could not be verified, each with the reason; empty if nothing was verified.
        published: the paper's row of the same model and schedule.
        unlike: why Rel is not comparable with the paper's: protocols that differ, benchmarks that are missing or added.
        runs: the runs behind the row, with settings, files and commands.
    """

    label: str
    kind: str
    seeds: tuple[int, ...] = ()
    cost: Cost = Cost()
    cells: Mapping[str, ScoreCell] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    acc: float | None = None
    rel: float | None = None
    rel_sd: float | None = None
    rel_interval: Interval | None = None
    groups: Mapping[str, GroupMean] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()
    above_blind: float | None = None
    random: Against | None = None
    baseline: str | None = None
    marks: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()
    published: PublishedRow | None = None
    unlike: tuple[str, ...] = ()
    runs: tuple[RunRecord, ...] = ()

    def score(self, task: str) -> float | None:
        return self.cells[task].score if task in self.cells else None


@dataclass(frozen=True)
class BudgetGroup:
    """Rows of about the same measured budget, best Rel first."""

    title: str
    rows: tuple[TableRow, ...]


@dataclass(frozen=True)
class ModelTable:
    """All rows of one checkpoint.

    Args:
        model: the checkpoint's name or folder. title: a shorter form of it.
        tasks: the columns.
        budgets: groups of rows: unpruned first, then by decreasing budget.
        notes: which rows were compared with which.
    """

    model: str
    title: str
    tasks: tuple[str, ...]
    budgets: tuple[BudgetGroup, ...]
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> list[TableRow]:
        return [row for budget in self.budgets for row in budget.rows]

    @property
    def missing(self) -> int:
        """Return how many scores are missing."""
        return sum(len(row.missing) for row in self.rows)

    def column(self, task: str) -> str:
        """Return the heading of a task's column, with the task's name if another column has the same benchmark."""
        name = TASKS[task].name
        first = next(other for other in self.tasks if TASKS[other].name == name)
        return name if first == task else f"{name} ({task})"


@dataclass(frozen=True)
class BenchTimes:
    """Times of the paper's Table 3 that ``bench --tasks … --json`` measured.

    Args:
        source: the file, and what it was measured on.
        by_schedule: by executed schedule, milliseconds of the decoder's prefill and of the whole answer.
    """

    source: str
    by_schedule: Mapping[str, tuple[float | None, float | None]]

    def of(self, schedule: str | None) -> tuple[float | None, float | None]:
        """Return both times of a schedule; None for what was not measured."""
        return self.by_schedule.get(schedule or "", (None, None))


@dataclass(frozen=True)
class Leaderboard:
    """The tables of all models, and what could not be read.

    Args:
        folders: folders from which the results were read.
        keep_paths: whether to print full paths instead of names relative to these folders.
        published_costs: rows of the paper's Table 3, if they are to be printed by themselves.
        times: times to print beside those of Table 3.
    """

    models: tuple[ModelTable, ...]
    problems: tuple[Problem, ...] = ()
    ignored: tuple[str, ...] = ()
    resamples: int = 0
    seed: int = 0
    folders: tuple[Path, ...] = ()
    keep_paths: bool = False
    published_costs: tuple[PublishedCost, ...] = ()
    times: BenchTimes | None = None

    @property
    def marked(self) -> list[tuple[str, TableRow]]:
        """Return the rows that have marks, with their model's title."""
        return [(model.title, row) for model in self.models for row in model.rows if row.marks]

    @property
    def unverified(self) -> list[tuple[str, TableRow]]:
        """Return the rows with numbers that could not be verified, with their model's title."""
        return [(model.title, row) for model in self.models for row in model.rows if row.unverified]
