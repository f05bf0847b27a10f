"""A finished table: models, budgets, rows and cells. Every format prints this and nothing else.

Scores are on the paper's scale, shares and ratios in percent, tokens, bytes and FLOPs per document.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.published import PublishedRow
from lmms_prune.leaderboard.records import Problem, RunRecord
from lmms_prune.leaderboard.statistics import Interval


@dataclass(frozen=True)
class Against:
    """A difference to another row, in words: "not distinguishable" unless the interval excludes zero."""

    other: str
    difference: Interval
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """One benchmark of a row beside its baseline, on the same documents.

    Args:
        difference: row minus baseline.
        p: of no difference: McNemar's exact test where the score is a share of right answers and each side is one run,
            else by resampling.
        p_holm: `p` corrected for the number of benchmarks of the row.
        mcnemar: McNemar's p of the right and wrong answers whatever the score is; None over several seeds.
        worse, better: units that turned from right to wrong and from wrong to right, mean over the seeds.
        units: what is counted and resampled: documents, MME's images, MMBench's circular groups.
        agreement: documents with the same answer as in the baseline, in percent.
        detectable: the smallest true difference that would be found with 80 % power at a two-sided 5 %.
        verdict: "better than unpruned", "worse than unpruned" or "not distinguishable".
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


@dataclass(frozen=True)
class ScoreCell:
    """One benchmark of a row.

    Args:
        score, sd: mean and standard deviation over the seeds.
        unpruned: the baseline's score. retention: the share of it that is left.
        above_blind: (score - blind) / (baseline - blind).
        comparison: with the baseline; None without samples of both.
        random: with the random control at the same measured budget.
        published: the paper's value for the same model and schedule.
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
    extras: Mapping[str, float] = field(default_factory=dict)

    @property
    def delta(self) -> float | None:
        """What a reproduction misses: ours minus the published value."""
        return None if self.published is None else self.score - self.published


@dataclass(frozen=True)
class Cost:
    """Measured, per document; the shares are of the row's baseline.

    Args:
        avg_visual_tokens: visual tokens, average over the decoder's layers and the documents with an image: the measured budget.
        original_tokens: visual tokens of these images.
        kv_mib: the prefill's cache. prefill_tflops: of the decoder, with selecting. encoder_tflops, decode_tflops: before and after it.
        samples_per_second: as the harness recorded: generation alone, at the run's batch size, of its first process.
        share_speed: None, with `no_share_speed` as the reason and `unlike` in a word, unless all that changes times is the same.
    """

    avg_visual_tokens: float | None = None
    original_tokens: float | None = None
    kv_mib: float | None = None
    prefill_tflops: float | None = None
    encoder_tflops: float | None = None
    decode_tflops: float | None = None
    samples_per_second: float | None = None
    device: str = ""
    share_tokens: float | None = None
    share_kv: float | None = None
    share_flops: float | None = None
    share_speed: float | None = None
    no_share_speed: str = ""
    unlike: str = ""


@dataclass(frozen=True)
class TableRow:
    """One schedule, over one seed or several.

    Args:
        label: the schedule as executed, with further settings where others have the same one.
        kind: "unpruned", "control", "oracle", "pruned" or "stock".
        seeds: of its runs.
        cells: by task; a benchmark without a number has none.
        missing: columns of its baseline that it lacks.
        acc, rel: as the paper has them; None where a benchmark is missing. rel_sd: over the seeds.
        rel_interval: of Rel minus 100.
        uncounted: benchmarks on which its baseline scores nothing, which count in no mean of ratios.
        above_blind: the mean over the benchmarks on which the baseline is distinguishably better than blind.
        random: Rel against the random control.
        baseline: the label of the row it is compared with; None if it is one.
        marks: what keeps it from being compared without a word of warning.
        faults: those of the marks that cannot be true: no verdict is given on such a row, nor beside it.
        published: the paper's row of the same model and schedule.
        runs: what it was made from: settings, files, commands.
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
    uncounted: tuple[str, ...] = ()
    above_blind: float | None = None
    random: Against | None = None
    baseline: str | None = None
    marks: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    published: PublishedRow | None = None
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
        model: its name or folder. title: the same, shorter.
        tasks: the columns.
        budgets: unpruned rows first, then the larger budgets.
        notes: what was compared with what.
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
        """Numbers that should be there."""
        return sum(len(row.missing) for row in self.rows)

    def column(self, task: str) -> str:
        """The heading of a task's column; with the task's name where another column measures the same benchmark."""
        name = TASKS[task].name
        first = next(other for other in self.tasks if TASKS[other].name == name)
        return name if first == task else f"{name} ({task})"


@dataclass(frozen=True)
class Leaderboard:
    """All models, and what could not be read.

    Args:
        folders: from which the results were read.
        keep_paths: whether what is printed has full paths; else names, relative to these folders.
    """

    models: tuple[ModelTable, ...]
    problems: tuple[Problem, ...] = ()
    ignored: tuple[str, ...] = ()
    resamples: int = 0
    seed: int = 0
    folders: tuple[Path, ...] = ()
    keep_paths: bool = False

    @property
    def marked(self) -> list[tuple[str, TableRow]]:
        """Rows that are not comparable without a word, with their model's title."""
        return [(model.title, row) for model in self.models for row in model.rows if row.marks]
