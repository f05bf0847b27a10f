"""From results to a finished table: which run is whose baseline and control, and what follows for every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from lmms_prune.leaderboard.benchmarks import ORDER, TASKS, acc, rel
from lmms_prune.leaderboard.comparability import distance, marks
from lmms_prune.leaderboard.compare import Draws, against_random, comparisons, rel_interval
from lmms_prune.leaderboard.costs import cost
from lmms_prune.leaderboard.entries import STOCK, UNPRUNED, Entry, deviation, entries
from lmms_prune.leaderboard.published import match
from lmms_prune.leaderboard.records import Problem, RunRecord
from lmms_prune.leaderboard.results import Results
from lmms_prune.leaderboard.rows import BudgetGroup, Leaderboard, ModelTable, ScoreCell, TableRow
from lmms_prune.leaderboard.sharing import unique_names

RESAMPLES = 2000
SAME_BUDGET = 0.03  # a control's measured tokens may differ by this share from the row's
ONE_GROUP = 0.10  # rows stand under one heading while each has at most this share of tokens less than the one before


def leaderboard(
    results: Results,
    baseline: Results | None = None,
    tasks: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Leaderboard:
    """Make the table.

    Args:
        results: what was read.
        baseline: runs to compare with instead of the unpruned ones among `results`; for each model one.
        tasks: the columns; None for all that there are.
        resamples: of every interval.
        seed: of the resampling.

    Returns:
        rows, and every problem: those of the reading, samples that cannot be used, models without a baseline.
    """
    problems = [*results.problems, *(baseline.problems if baseline else [])]
    given = _given(baseline.records, results.records) if baseline else []
    by_model: dict[str, list[RunRecord]] = {}
    for record in [*results.records, *(one for one in given if one not in results.records)]:
        chosen = {task: one for task, one in record.tasks.items() if tasks is None or task in tasks}
        by_model.setdefault(record.model, []).append(replace(record, tasks=chosen))
    titles = _titles(list(by_model))
    models = []
    for model, records in by_model.items():
        found = entries(records, problems)
        wanted = {record.key(("seed",)) for record in given if record.model == model}
        candidates = [one for one in found if not baseline or one.runs[0].key(("seed",)) in wanted]
        if found:
            models.append(
                _model(model, titles[model], found, candidates, baseline is not None, problems, resamples, seed)
            )
    ignored = results.ignored | (baseline.ignored if baseline else set())
    models.sort(key=lambda one: one.title)
    folders = (*results.folders, *(baseline.folders if baseline else ()))
    return Leaderboard(tuple(models), tuple(problems), tuple(sorted(ignored)), resamples, seed, folders)


def _given(baseline: Sequence[RunRecord], records: Sequence[RunRecord]) -> list[RunRecord]:
    """The baseline's runs, told from other runs with the same settings, such as those of an older version."""
    others = {record.key() for record in records if record not in baseline}
    return [
        replace(one, settings={**one.settings, "run": "--baseline"}) if one.key() in others else one for one in baseline
    ]


def _titles(models: Sequence[str]) -> dict[str, str]:
    """Hub names as they are, folders by their last part, or by as many as tell them apart."""
    folders = [model for model in models if model.startswith(("/", ".", "~"))]
    return {model: model for model in models} | unique_names(folders)


def _model(
    model: str,
    title: str,
    found: Sequence[Entry],
    candidates: Sequence[Entry],
    given: bool,
    problems: list[Problem],
    resamples: int,
    seed: int,
) -> ModelTable:
    candidates = _baselines(candidates, given)
    where = str(found[0].runs[0].sources[0].path)
    if not candidates:
        what = "--baseline holds no run" if given else "no unpruned run (schedule=none)"
        problems.append(Problem(where, f"{what} of {model}: its rows have no Rel, no intervals and no shares."))
    elif given and len(candidates) > 1:
        names = "; ".join(one.label for one in candidates)
        problems.append(
            Problem(where, f"--baseline holds {len(candidates)} runs of {model}, the nearest is taken: {names}.")
        )
    draws = Draws(found, resamples, seed)
    tasks = tuple(sorted({task for entry in found for task in entry.tasks}, key=ORDER.__getitem__))
    rows = [_row(entry, found, candidates, tasks, draws) for entry in found]
    return ModelTable(model, title, tasks, _budgets(rows), _notes(rows))


def _baselines(candidates: Sequence[Entry], given: bool) -> list[Entry]:
    """Unpruned runs of ours if there are any, else those of others; or whatever was given."""
    for kind in (UNPRUNED, STOCK):
        if some := [one for one in candidates if one.kind == kind]:
            return some
    return list(candidates) if given else []


def _row(
    entry: Entry, found: Sequence[Entry], candidates: Sequence[Entry], tasks: Sequence[str], draws: Draws
) -> TableRow:
    baseline = min(candidates, key=lambda one: (one is not entry, distance(entry, one)), default=None)
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
    row = replace(row, acc=acc({task: row.score(task) for task in tasks}))
    return row if baseline is None else _beside(row, entry, baseline, found, draws)


def _with_extras(row: TableRow, entry: Entry) -> TableRow:
    """The row with POPE's further figures, and with the published values."""
    printed = {} if row.published is None else row.published.scores
    cells = {}
    for task, cell in row.cells.items():
        each = [run.extras for run in entry.samples.get(task, ())]
        shared = set.intersection(*map(set, each)) if each else set()
        extras = {name: fmean(one[name] for one in each) for name in each[0] if name in shared} if each else {}
        cells[task] = replace(cell, extras=extras, published=printed.get(TASKS[task].name))
    return replace(row, cells=cells)


def _beside(row: TableRow, entry: Entry, baseline: Entry, found: Sequence[Entry], draws: Draws) -> TableRow:
    """The row with all that a baseline, a blind run and a random control tell of it."""
    whole, tasks = baseline.scores, baseline.tasks
    counted = [task for task in tasks if whole[task]]
    ratios = [rel({t: run.tasks[t].score if t in run.tasks else None for t in counted}, whole) for run in entry.runs]
    compared = {} if entry is baseline else comparisons(entry, baseline, tasks, draws)
    control = _control(entry, found)
    overall, each = (None, {}) if control is None else against_random(entry, control, baseline, counted, draws)
    above = _above_blind(entry, baseline, found, draws)
    cells = {
        task: replace(
            cell,
            unpruned=whole.get(task),
            retention=100 * cell.score / whole[task] if whole.get(task) else None,
            above_blind=above.get(task, (None, False))[0],
            comparison=compared.get(task),
            random=each.get(task),
        )
        for task, cell in row.cells.items()
    }
    sure = [value for value, distinguishable in above.values() if distinguishable]
    return replace(
        row,
        cells=cells,
        rel=rel(entry.scores, {task: whole[task] for task in counted}),
        rel_sd=deviation([value for value in ratios if value is not None]),
        rel_interval=None if entry is baseline else rel_interval(entry, baseline, counted, draws),
        uncounted=tuple(task for task in tasks if not whole[task]),
        above_blind=fmean(sure) if sure and not row.missing else None,
        random=overall,
        baseline=None if entry is baseline else baseline.label,
    )


def _control(entry: Entry, found: Sequence[Entry]) -> Entry | None:
    """The random control at the measured budget of `entry`: the most alike, then the nearest, then that of most seeds."""
    if entry.is_random or not entry.avg_visual_tokens or not entry.loses_tokens:
        return None
    budget, positions = entry.avg_visual_tokens, entry.runs[0].settings.get("positions")

    def order(one: Entry) -> tuple[bool, int, float, int, str]:
        other = one.runs[0].settings.get("positions") != positions
        return other, distance(entry, one), _missed(one, budget), -len(one.runs), one.label

    near = [one for one in found if one.is_random and _missed(one, budget) <= SAME_BUDGET * budget]
    return min(near, key=order, default=None)


def _missed(entry: Entry, budget: float) -> float:
    """By how many tokens a row's measured budget is another one."""
    return abs((entry.avg_visual_tokens or 0.0) - budget)


def _above_blind(entry: Entry, baseline: Entry, found: Sequence[Entry], draws: Draws) -> dict[str, tuple[float, bool]]:
    """(score - blind) / (baseline - blind) in percent, and whether the baseline is distinguishably better than blind."""
    blind = min((one for one in found if one.is_blind), key=lambda one: distance(one, baseline), default=None)
    if blind is None:
        return {}
    drops = comparisons(blind, baseline, baseline.tasks, draws)
    shares = {}
    for task in entry.tasks:
        room = baseline.scores.get(task, 0) - blind.scores.get(task, float("inf"))
        if room > 0:
            sure = task in drops and drops[task].difference.high < 0
            shares[task] = 100 * (entry.scores[task] - blind.scores[task]) / room, sure
    return shares


def _budgets(rows: Sequence[TableRow]) -> tuple[BudgetGroup, ...]:
    """Unpruned rows, then those of about the same measured tokens, then those without a measurement."""
    whole = [row for row in rows if row.kind == UNPRUNED]
    unmeasured = [row for row in rows if row.kind != UNPRUNED and row.cost.avg_visual_tokens is None]
    rest = sorted(
        (row for row in rows if row.kind != UNPRUNED and row.cost.avg_visual_tokens is not None),
        key=_tokens,
        reverse=True,
    )
    groups: list[list[TableRow]] = []
    for row in rest:
        if groups and _tokens(row) >= (1 - ONE_GROUP) * _tokens(groups[-1][-1]):
            groups[-1].append(row)
        else:
            groups.append([row])
    made = [BudgetGroup("unpruned", tuple(whole))] if whole else []
    for group in groups:
        most, least = f"{_tokens(group[0]):.0f}", f"{_tokens(group[-1]):.0f}"
        share = fmean(row.cost.share_tokens or 0 for row in group)
        span = most if most == least else f"{least} to {most}"
        title = f"{span} tokens" + (f" ({share:.0f} %)" if share else "")
        made.append(BudgetGroup(title, tuple(sorted(group, key=_best_first))))
    if unmeasured:
        made.append(BudgetGroup("no measured budget", tuple(sorted(unmeasured, key=_best_first))))
    return tuple(made)


def _tokens(row: TableRow) -> float:
    return row.cost.avg_visual_tokens or 0.0


def _best_first(row: TableRow) -> tuple[float, str]:
    return (-1.0 if row.rel is None else -row.rel), row.label


def _quoted(labels: Sequence[str]) -> str:
    """Labels in a sentence, in which the unpruned run's, "none", would read as a word."""
    return "; ".join(f"'{label}'" for label in labels)


def _notes(rows: Sequence[TableRow]) -> tuple[str, ...]:
    """Which rows the others were compared with."""
    notes = []
    if baselines := sorted({row.baseline for row in rows if row.baseline}):
        notes.append(f"Rel and differences are to the row{'s' * (len(baselines) > 1)} {_quoted(baselines)}.")
    if controls := sorted({row.random.other for row in rows if row.random}):
        notes.append(f"Random control at the same measured tokens (within {SAME_BUDGET:.0%}): {_quoted(controls)}.")
    if uncounted := sorted({TASKS[task].name for row in rows for task in row.uncounted}):
        notes.append(f"The unpruned model scores 0 on {', '.join(uncounted)}, which cannot count in a mean of ratios.")
    return tuple(notes)
