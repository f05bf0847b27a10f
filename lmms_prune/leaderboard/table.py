"""Building the leaderboard from results: choosing baselines and controls, and computing every row."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from statistics import fmean

from lmms_prune.leaderboard.benchmarks import ORDER, TASKS, acc, group_means, rel
from lmms_prune.leaderboard.comparability import control_marks, distance, marks, unlike_rows
from lmms_prune.leaderboard.compare import Draws, against_random, comparisons, rel_interval
from lmms_prune.leaderboard.costs import cost
from lmms_prune.leaderboard.entries import Entry, deviation, entries
from lmms_prune.leaderboard.protocol import differences, rel_differences
from lmms_prune.leaderboard.published import match
from lmms_prune.leaderboard.reader import SamplesReader
from lmms_prune.leaderboard.records import Problem, RunRecord
from lmms_prune.leaderboard.results import Results, on_scale
from lmms_prune.leaderboard.rows import STOCK, UNPRUNED, BudgetGroup, Leaderboard, ModelTable, ScoreCell, TableRow
from lmms_prune.leaderboard.sharing import unique_names

RESAMPLES = 2000
SAME_BUDGET = 0.03  # largest relative difference in measured tokens between a row and its random control
ONE_GROUP = 0.10  # a row starts a new budget group if it has fewer tokens than its predecessor by more than this share


def leaderboard(
    results: Results,
    baseline: Results | None = None,
    tasks: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    reader: SamplesReader | None = None,
    counted: Collection[str] = (),
) -> Leaderboard:
    """Build the leaderboard from results.

    Args:
        results: the results to tabulate.
        baseline: runs to compare with instead of the unpruned ones among `results`, one per model.
        tasks: the columns; None for all.
        resamples: number of resamples for every interval.
        seed: seed of the resampling.
        reader: what reads the samples; by default each file is read here, one after the other.
        counted: tasks that count in Acc and Rel beside the paper's ten benchmarks.

    Returns:
        the leaderboard, with every problem: unreadable files, unusable samples, models without a baseline.
    """
    ignored = results.ignored | (baseline.ignored if baseline else {})
    problems = [*results.problems, *(baseline.problems if baseline else [])]
    problems += [
        Problem(task, f"cannot be a column: {reason}. --benchmarks names the columns to show without it.")
        for task, reason in sorted(ignored.items())
        if tasks is None or task in tasks
    ]
    baseline_runs = _distinct(baseline.records, results.records) if baseline else []
    by_model: dict[str, list[RunRecord]] = {}
    for record in [*results.records, *(run for run in baseline_runs if run not in results.records)]:
        chosen = {name: task for name, task in record.tasks.items() if tasks is None or name in tasks}
        by_model.setdefault(record.model, []).append(on_scale(replace(record, tasks=chosen)))
    reader = reader or SamplesReader()
    scored = [task for records in by_model.values() for record in records for task in record.tasks.values()]
    reader.read_all((task.samples, TASKS[task.task]) for task in scored if task.samples is not None)
    titles = _titles(list(by_model))
    models = []
    for model, records in by_model.items():
        rows = entries(records, problems, reader)
        wanted = {record.key(("seed",)) for record in baseline_runs if record.model == model}
        candidates = [entry for entry in rows if not baseline or entry.runs[0].key(("seed",)) in wanted]
        if rows:
            draws = Draws(rows, resamples, seed, reader)
            models.append(
                _model(model, titles[model], rows, candidates, baseline is not None, problems, draws, counted)
            )
    models.sort(key=lambda model: model.title)
    folders = (*results.folders, *(baseline.folders if baseline else ()))
    return Leaderboard(tuple(models), tuple(problems), tuple(sorted(ignored)), resamples, seed, folders)


def _distinct(baseline: Sequence[RunRecord], records: Sequence[RunRecord]) -> list[RunRecord]:
    """Mark the baseline's runs that share their settings with other runs, such as those of an older version."""
    others = {record.key() for record in records if record not in baseline}
    return [
        replace(record, settings={**record.settings, "run": "--baseline"}) if record.key() in others else record
        for record in baseline
    ]


def _titles(models: Sequence[str]) -> dict[str, str]:
    """Return titles of models: hub names unchanged, folders by as few last parts as distinguish them."""
    folders = [model for model in models if model.startswith(("/", ".", "~"))]
    return {model: model for model in models} | unique_names(folders)


def _model(
    model: str,
    title: str,
    all_entries: Sequence[Entry],
    candidates: Sequence[Entry],
    has_baseline: bool,
    problems: list[Problem],
    draws: Draws,
    counted: Collection[str],
) -> ModelTable:
    candidates = _baselines(candidates, has_baseline)
    path = str(all_entries[0].runs[0].sources[0].path)
    if not candidates:
        reason = "--baseline holds no run" if has_baseline else "no unpruned run (schedule=none)"
        problems.append(Problem(path, f"{reason} of {model}: its rows have no Rel, no intervals and no shares."))
    elif has_baseline and len(candidates) > 1:
        names = "; ".join(candidate.label for candidate in candidates)
        problems.append(
            Problem(path, f"--baseline holds {len(candidates)} runs of {model}, the nearest is taken: {names}.")
        )
    tasks = tuple(sorted({task for entry in all_entries for task in entry.tasks}, key=ORDER.__getitem__))
    in_means = tuple(task for task in tasks if TASKS[task].counts or task in counted)
    rows = [_row(entry, all_entries, candidates, tasks, draws, in_means) for entry in all_entries]
    return ModelTable(model, title, tasks, _budgets(rows), (*_notes(rows), *_other_notes(tasks, in_means)))


def _baselines(candidates: Sequence[Entry], has_baseline: bool) -> list[Entry]:
    """Choose baselines: our unpruned runs, else stock runs, else any run if a baseline was given."""
    for kind in (UNPRUNED, STOCK):
        if of_kind := [entry for entry in candidates if entry.kind == kind]:
            return of_kind
    return list(candidates) if has_baseline else []


def _row(
    entry: Entry,
    all_entries: Sequence[Entry],
    candidates: Sequence[Entry],
    tasks: Sequence[str],
    draws: Draws,
    in_means: Sequence[str],
) -> TableRow:
    """Return one row.

    Args:
        entry, all_entries, candidates, draws: the runs of the row, all rows, possible baselines, and resampled scores.
        tasks: the columns.
        in_means: those that count in Acc and Rel.
    """
    baseline = min(candidates, key=lambda candidate: (candidate is not entry, distance(entry, candidate)), default=None)
    row = TableRow(
        label=entry.label,
        kind=entry.kind,
        seeds=tuple(run.seed for run in entry.runs),
        cost=cost(entry, baseline),
        cells={task: ScoreCell(entry.scores[task], deviation(entry.each(task))) for task in entry.tasks},
        marks=marks(entry, baseline),
        faults=entry.faults,
        published=match(entry.runs[0].model, entry.schedule),
        runs=entry.runs,
    )
    row = _with_extras(row, entry)
    row = replace(row, missing=tuple(task for task in tasks if task not in row.cells))
    if row.missing:
        row = replace(row, marks=(*row.marks, f"missing: {', '.join(TASKS[task].name for task in row.missing)}"))
    scores = {task: row.score(task) for task in in_means}
    unlike = rel_differences(row, baseline, in_means)
    row = replace(row, acc=acc(scores), groups=group_means(scores), unlike=unlike)
    return row if baseline is None else _compared(row, entry, baseline, all_entries, in_means, draws)


def _with_extras(row: TableRow, entry: Entry) -> TableRow:
    """Add POPE's further metrics and the published values to a row."""
    printed = {} if row.published is None else row.published.scores
    cells = {}
    for task, cell in row.cells.items():
        per_seed = [run.extras for run in entry.samples.get(task, ())]
        shared = set.intersection(*map(set, per_seed)) if per_seed else set()
        extras = (
            {name: fmean(metrics[name] for metrics in per_seed) for name in per_seed[0] if name in shared}
            if per_seed
            else {}
        )
        value = printed.get(TASKS[task].name)
        unlike = () if value is None or row.published is None else differences(entry, task, row.published)
        cells[task] = replace(cell, extras=extras, published=value, unlike=unlike)
    return replace(row, cells=cells)


def _compared(
    row: TableRow,
    entry: Entry,
    baseline: Entry,
    all_entries: Sequence[Entry],
    in_means: Sequence[str],
    draws: Draws,
) -> TableRow:
    """Add to a row its comparisons with the baseline, the blind run and the random control."""
    unpruned, tasks = baseline.scores, baseline.tasks
    counted = [task for task in tasks if unpruned[task] and task in in_means]
    ratios = [rel({t: run.tasks[t].score if t in run.tasks else None for t in counted}, unpruned) for run in entry.runs]
    compared = {} if entry is baseline else comparisons(entry, baseline, tasks, draws)
    control = _control(entry, all_entries)
    overall, by_task = (None, {}) if control is None else against_random(entry, control, baseline, counted, draws)
    above = _above_blind(entry, baseline, all_entries, draws)
    cells = {
        task: replace(
            cell,
            unpruned=unpruned.get(task),
            retention=_retention(task, cell.score, unpruned.get(task)),
            above_blind=above.get(task, (None, False))[0],
            comparison=compared.get(task),
            random=by_task.get(task),
        )
        for task, cell in row.cells.items()
    }
    distinguishable_shares = [above[task][0] for task in in_means if above.get(task, (None, False))[1]]
    others = () if overall is None or control is None else control_marks(entry, control)
    return replace(
        row,
        cells=cells,
        marks=tuple(dict.fromkeys((*row.marks, *others))),
        rel=rel(entry.scores, {task: unpruned[task] for task in counted}),
        groups=group_means({task: row.score(task) for task in in_means}, {task: unpruned[task] for task in counted}),
        rel_sd=deviation([value for value in ratios if value is not None]),
        rel_interval=None if entry is baseline else rel_interval(entry, baseline, counted, draws),
        uncounted=tuple(task for task in tasks if not unpruned[task] and task in in_means),
        above_blind=fmean(distinguishable_shares) if distinguishable_shares and not row.missing else None,
        random=overall,
        baseline=None if entry is baseline else baseline.label,
    )


def _retention(task: str, score: float, unpruned: float | None) -> float | None:
    """Return the score relative to the baseline in percent; None where that says nothing, such as where lower is better."""
    return 100 * score / unpruned if unpruned and unpruned > 0 and TASKS[task].higher_is_better else None


def _control(entry: Entry, all_entries: Sequence[Entry]) -> Entry | None:
    """Choose the random control at the measured budget of `entry`.

    Preference: same position policy, fewest differing settings, nearest budget, most seeds.
    """
    if entry.is_random or not entry.avg_visual_tokens or not entry.loses_tokens:
        return None
    budget, positions = entry.avg_visual_tokens, entry.runs[0].settings.get("positions")

    def order(candidate: Entry) -> tuple[bool, int, float, int, str]:
        other = candidate.runs[0].settings.get("positions") != positions
        return other, distance(entry, candidate), _missed(candidate, budget), -len(candidate.runs), candidate.label

    near = [
        candidate
        for candidate in all_entries
        if candidate.is_random and _missed(candidate, budget) <= SAME_BUDGET * budget
    ]
    return min(near, key=order, default=None)


def _missed(entry: Entry, budget: float) -> float:
    """Return by how many tokens an entry misses a measured budget."""
    return abs((entry.avg_visual_tokens or 0.0) - budget)


def _above_blind(
    entry: Entry, baseline: Entry, all_entries: Sequence[Entry], draws: Draws
) -> dict[str, tuple[float, bool]]:
    """Return (score - blind) / (baseline - blind) in percent, and whether the baseline distinguishably beats blind."""
    blind = min(
        (candidate for candidate in all_entries if candidate.is_blind),
        key=lambda candidate: distance(candidate, baseline),
        default=None,
    )
    if blind is None:
        return {}
    drops = comparisons(blind, baseline, baseline.tasks, draws)
    shares = {}
    for task in entry.tasks:
        if task not in baseline.scores or task not in blind.scores:
            continue
        room = baseline.scores[task] - blind.scores[task]
        if TASKS[task].sign * room > 0:
            distinguishable = task in drops and drops[task].mark == "▼"
            shares[task] = 100 * (entry.scores[task] - blind.scores[task]) / room, distinguishable
    return shares


def _budgets(rows: Sequence[TableRow]) -> tuple[BudgetGroup, ...]:
    """Group rows: unpruned ones, then those of similar measured tokens, then those without a measurement."""
    unpruned = [row for row in rows if row.kind == UNPRUNED]
    unmeasured = [row for row in rows if row.kind != UNPRUNED and row.cost.avg_visual_tokens is None]
    pruned = sorted(
        (row for row in rows if row.kind != UNPRUNED and row.cost.avg_visual_tokens is not None),
        key=_tokens,
        reverse=True,
    )
    groups: list[list[TableRow]] = []
    for row in pruned:
        if groups and _tokens(row) >= (1 - ONE_GROUP) * _tokens(groups[-1][-1]):
            groups[-1].append(row)
        else:
            groups.append([row])
    budgets = [BudgetGroup("unpruned", tuple(unpruned))] if unpruned else []
    for group in groups:
        most, least = f"{_tokens(group[0]):.0f}", f"{_tokens(group[-1]):.0f}"
        share = fmean(row.cost.share_tokens or 0 for row in group)
        span = most if most == least else f"{least} to {most}"
        title = f"{span} tokens" + (f" ({share:.0f} %)" if share else "")
        budgets.append(BudgetGroup(title, tuple(sorted(group, key=_best_first))))
    if unmeasured:
        budgets.append(BudgetGroup("no measured budget", tuple(sorted(unmeasured, key=_best_first))))
    return tuple(budgets)


def _tokens(row: TableRow) -> float:
    return row.cost.avg_visual_tokens or 0.0


def _best_first(row: TableRow) -> tuple[float, str]:
    return (-1.0 if row.rel is None else -row.rel), row.label


def _quoted(labels: Sequence[str]) -> str:
    """Quote labels for a sentence, where the unpruned run's label "none" would read as a word."""
    return "; ".join(f"'{label}'" for label in labels)


def _other_notes(tasks: Sequence[str], in_means: Sequence[str]) -> tuple[str, ...]:
    """Say which columns do not count in Acc and Rel, and which metric the columns are that are not known by name."""
    uncounted = [task for task in tasks if task not in in_means]
    names = ", ".join(TASKS[task].name for task in uncounted)
    notes = (
        [f"Not in Acc and Rel: {names} (--count counts them, --details prints their intervals)."] if uncounted else []
    )
    return (*notes, *(f"{TASKS[task].note}." for task in tasks if TASKS[task].note))


def _notes(rows: Sequence[TableRow]) -> tuple[str, ...]:
    """Name the rows that served as baselines and controls."""
    notes = []
    if baselines := sorted({row.baseline for row in rows if row.baseline}):
        notes.append(f"Rel and differences are to the row{'s' * (len(baselines) > 1)} {_quoted(baselines)}.")
    if controls := sorted({row.random.other for row in rows if row.random}):
        notes.append(f"Random control at the same measured tokens (within {SAME_BUDGET:.0%}): {_quoted(controls)}.")
    notes += unlike_rows(rows)
    if uncounted := sorted({TASKS[task].name for row in rows for task in row.uncounted}):
        notes.append(f"The unpruned model scores 0 on {', '.join(uncounted)}, which cannot count in a mean of ratios.")
    return tuple(notes)
