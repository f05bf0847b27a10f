"""Tables of texts that every format prints: headings, rows, and which cells are bold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lmms_prune.leaderboard.benchmarks import GROUPS, TASKS, GroupMean
from lmms_prune.leaderboard.rows import ORACLE, Against, BudgetGroup, Cost, Leaderboard, ModelTable, ScoreCell, TableRow
from lmms_prune.record.run import GPU_MEMORY, PROCESS_MEMORY
from lmms_prune.schedule.presets import PRESETS

_LONG = 3  # most stages that a label shows; a longer schedule is named by its preset or its number of stages


@dataclass(frozen=True)
class Line:
    """One line of a table: cell texts and the indices of bold ones, or a heading over the lines that follow."""

    cells: tuple[str, ...] = ()
    bold: frozenset[int] = frozenset()
    heading: str = ""


@dataclass(frozen=True)
class TextTable:
    """A table of texts. The first column is left-aligned, the others right-aligned; notes follow the table."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()


def grids(board: Leaderboard, with_details: bool, marked: bool = False) -> Iterator[TextTable]:
    """Yield all tables of the leaderboard, in printed order; `marked` as for `scores`."""
    from lmms_prune.leaderboard.cost_table import paper_costs  # it makes its tables by this module

    names = letters(board)
    for model in board.models:
        yield scores(model, marked)
        if (group_table := by_group(model)) is not None:
            yield group_table
        if any(row.runs for row in model.rows):
            yield cost(model)
            if len((confidence_table := confidence(model, names)).columns) > 1:
                yield confidence_table
        if (paper_table := reproduction(model)) is not None:
            yield paper_table
        if (cost_grid := paper_costs(model, board)) is not None:
            yield cost_grid
        if with_details:
            yield from (details(row, model) for row in model.rows if row.baseline is not None)


def only_columns(grid: TextTable, kept: Sequence[int]) -> TextTable:
    """Return the table with the columns in `kept` only."""
    lines = (
        Line(
            tuple(line.cells[i] for i in kept if line.cells),
            frozenset(new for new, old in enumerate(kept) if old in line.bold),
            line.heading,
        )
        for line in grid.lines
    )
    return TextTable(grid.title, tuple(grid.columns[i] for i in kept), tuple(lines), grid.notes)


def without_empty_columns(grid: TextTable) -> TextTable:
    """Return the table without its empty columns."""
    lines = [line for line in grid.lines if line.cells]
    return only_columns(grid, [i for i in range(len(grid.columns)) if any(line.cells[i] for line in lines)])


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """Format a number; "" for None."""
    # Adding 0.0 turns a rounded -0.0 into 0.0, which prints without a sign.
    return "" if value is None else f"{round(value, digits) + 0.0:{'+' if sign else ''}.{digits}f}"


def digits(task: str) -> int:
    """Return the decimals with which the paper prints a task's score; more where a score may be far below 1."""
    return 3 if not TASKS[task].scaled else 0 if TASKS[task].best_score > 100 else 1


def label(row: TableRow) -> str:
    """Shorten a row's schedule for a table; several seeds are counted, and an oracle is marked as one."""
    schedule, *settings = row.label.split(" (", 1)
    stages = schedule.split(",")
    if len(stages) > _LONG:
        names = [name for name, text in PRESETS.items() if text == schedule]
        schedule = names[0] if names else f"{stages[0]}, … ({len(stages)} stages)"
    text = " (".join([schedule, *settings]) + (" [oracle]" if row.kind == ORACLE else "")
    return f"{text} × {len(row.seeds)} seeds" if len(row.seeds) > 1 else text


def letters(board: Leaderboard) -> dict[str, str]:
    """Give every mark of the leaderboard a short name: a to z, then aa, ab and so on."""
    marks = list(dict.fromkeys(mark for _, row in board.marked for mark in row.marks))
    return {mark: ("" if i < 26 else chr(96 + i // 26)) + chr(97 + i % 26) for i, mark in enumerate(marks)}


def scores(model: ModelTable, marked: bool = False) -> TextTable:
    """Tabulate every benchmark, Acc and Rel; the best value within each budget is bold.

    With `marked`, a score is followed by the mark of its comparison with the baseline.
    """
    columns = ("schedule", "tokens", *(model.column(task) for task in model.tasks), "Acc", "Rel")
    lines: list[Line] = []
    for budget in model.budgets:
        lines.append(Line(heading=budget.title))
        best = _best(budget, model.tasks)
        for row in budget.rows:
            cells = [label(row), number(row.cost.avg_visual_tokens, 0)]
            for task in model.tasks:
                cell = row.cells.get(task)
                mark = cell.comparison.mark if marked and cell is not None and cell.comparison is not None else ""
                cells.append(_with_spread(row.score(task), None if cell is None else cell.sd, digits(task), mark))
            cells += [number(row.acc), _with_spread(row.rel, row.rel_sd, 1)]
            values = [None, None, *(row.score(task) for task in model.tasks), row.acc, row.rel]
            bold = {i for i, value in enumerate(values) if value is not None and best.get(i) == _shown(i, value, model)}
            lines.append(Line(tuple(cells), frozenset() if row.kind == ORACLE else frozenset(bold)))
    return without_empty_columns(TextTable(model.title, columns, tuple(lines)))


def _with_spread(value: float | None, spread: float | None, decimals: int, mark: str = "") -> str:
    return number(value, decimals) + mark + ("" if spread is None else f" ±{spread:.{decimals}f}")


def _shown(column: int, value: float, model: ModelTable) -> float:
    """Round a value as printed, so that equal-looking values count as equally good."""
    decimals = digits(model.tasks[column - 2]) if column - 2 < len(model.tasks) else 1
    return round(value, decimals)


def _best(budget: BudgetGroup, tasks: Sequence[str]) -> dict[int, float]:
    """Return the best printed number by column, if at least two rows have one; oracles do not compete."""
    best = {}
    getters = [*((lambda row, task=task: row.score(task)) for task in tasks), lambda row: row.acc, lambda row: row.rel]
    for i, get in enumerate(getters):
        values = [value for row in budget.rows if row.kind != ORACLE and (value := get(row)) is not None]
        if len(values) > 1:
            strongest = min if i < len(tasks) and not TASKS[tasks[i]].higher_is_better else max
            best[i + 2] = round(strongest(values), digits(tasks[i]) if i < len(tasks) else 1)
    return best


def by_group(model: ModelTable) -> TextTable | None:
    """Tabulate Acc and Rel over each group of benchmarks; None if no group has two, or if there is only one group."""
    counts = Counter(TASKS[task].group for task in model.tasks if TASKS[task].group is not None)
    if len(counts) < 2 or max(counts.values()) < 2:
        return None
    groups = [group for group in GROUPS if group in counts]
    columns = ("schedule", "tokens", *(f"{group}: {mean}" for group in groups for mean in ("Acc", "Rel")))
    lines: list[Line] = []
    for budget in model.budgets:
        lines.append(Line(heading=budget.title))
        for row in budget.rows:
            means = [row.groups.get(group, GroupMean(None)) for group in groups]
            cells = [number(value) for mean in means for value in (mean.acc, mean.rel)]
            lines.append(Line((label(row), number(row.cost.avg_visual_tokens, 0), *cells)))
    names = {
        group: ", ".join(model.column(task) for task in model.tasks if TASKS[task].group == group) for group in groups
    }
    notes = ("; ".join(f"{group}: {benchmarks}" for group, benchmarks in names.items()) + ".",)
    return without_empty_columns(TextTable(f"{model.title}: means by group", columns, tuple(lines), notes))


def cost(model: ModelTable) -> TextTable:
    """Tabulate each row's measured cost, absolute and relative to its baseline."""
    memory = (GPU_MEMORY, PROCESS_MEMORY)
    peaks = (f"peak GiB, {kind}" for kind in memory)
    columns = ("schedule", "tokens", "%", "KV MiB", "%", "TFLOPs", "%", "samples/s", "%", *peaks)
    lines: list[Line] = []
    notes = []
    for budget in model.budgets:
        lines.append(Line(heading=budget.title))
        for row in budget.rows:
            measured = row.cost
            cells = [number(measured.avg_visual_tokens, 0), number(measured.share_tokens, 0)]
            cells += [_three(measured.kv_mib), number(measured.share_kv, 0)]
            cells += [_three(measured.prefill_tflops), number(measured.share_flops, 0)]
            share = "" if measured.share_speed_low is None else number(measured.share_speed, 0)
            if share:
                share += f" ({number(measured.share_speed_low, 0)} to {number(measured.share_speed_high, 0)})"
            cells += [speed(measured), share or measured.unlike]
            cells += [_three(measured.peak_gib) if measured.peak_of == kind else "" for kind in memory]
            if measured.no_share_speed:
                notes.append(f"{label(row)}: its speed is no share of the baseline's: {measured.no_share_speed}.")
            lines.append(Line((label(row), *cells)))
    if any(row.cost.samples_per_second is not None and not row.cost.has_speed for row in model.rows):
        notes.append("A speed needs an interval, so a row of a single run has none: run it with several seeds.")
    devices = sorted({row.cost.device for row in model.rows if row.cost.device})
    title = f"{model.title}: cost on {'; '.join(devices)}"
    return without_empty_columns(TextTable(title, columns, tuple(lines), tuple(notes)))


def speed(cost: Cost) -> str:
    """Format samples a second with their interval; "" without one."""
    if not cost.has_speed:
        return ""
    low, high = cost.samples_per_second_low, cost.samples_per_second_high
    return f"{_three(cost.samples_per_second)} ({_three(low)} to {_three(high)})"


def confidence(model: ModelTable, names: dict[str, str]) -> TextTable:
    """Tabulate each row's Rel interval, its comparison with the blind and random runs, and its marks by letter."""
    columns = ("schedule", "Rel", "95 %", "above blind", "against random", "by, 95 %", "marks")
    lines: list[Line] = []
    for budget in model.budgets:
        lines.append(Line(heading=budget.title))
        for row in budget.rows:
            interval = row.rel_interval
            span = "" if interval is None else between(100 + interval.low, 100 + interval.high)
            marks = " ".join(names[mark] for mark in row.marks)
            cells = (number(row.rel), span, number(row.above_blind), *against(row.random), marks)
            lines.append(Line((label(row), *cells)))
    return without_empty_columns(TextTable(f"{model.title}: confidence", columns, tuple(lines)))


def _three(value: float | None) -> str:
    """Format with three significant digits and without an exponent."""
    return (
        ""
        if value is None
        else f"{value:.0f}"
        if value >= 100
        else f"{float(f'{value:.3g}'):.6f}".rstrip("0").rstrip(".")
    )


def between(low: float, high: float) -> str:
    """Format an interval."""
    return f"{number(low)} to {number(high)}"


def against(comparison: Against | None) -> tuple[str, str]:
    """Return a verdict and its difference with the interval; empty texts without a comparison."""
    if comparison is None:
        return "", ""
    difference = comparison.difference
    return comparison.verdict, f"{number(difference.value, 1, True)} ({between(difference.low, difference.high)})"


DETAILS = (
    *("benchmark", "score", "change", "95 %", "p, Holm", "lost", "gained", "of", "same %", "detectable"),
    *("kept %", "above blind", "random +, 95 %"),
)


def details(row: TableRow, model: ModelTable) -> TextTable:
    """Tabulate all statistics of one row, one benchmark per line."""
    lines: list[Line] = []
    notes = []
    for task in model.tasks:
        if task not in row.cells:
            lines.append(Line((model.column(task), *[""] * (len(DETAILS) - 1))))
            continue
        cell, decimals = row.cells[task], digits(task)
        statistics = [""] * 8
        if (comparison := cell.comparison) is not None:
            flips = [
                f"{comparison.worse:g}",
                f"{comparison.better:g}",
                str(comparison.units),
                number(comparison.agreement),
            ]
            statistics = [
                number(comparison.difference.value, decimals, True),
                between(comparison.difference.low, comparison.difference.high),
            ]
            statistics += [f"{comparison.p_holm:.3f}", *flips, number(comparison.detectable, decimals)]
        shares = [number(cell.retention), number(cell.above_blind), against(cell.random)[1]]
        lines.append(Line((model.column(task), number(cell.score, decimals), *statistics, *shares)))
        if cell.extras:
            extras = ", ".join(f"{name} {value:.1f}" for name, value in cell.extras.items())
            notes.append(f"{model.column(task)}: {extras}.")
    return without_empty_columns(TextTable(f"{model.title}, {label(row)}", DETAILS, tuple(lines), tuple(notes)))


def reproduction(model: ModelTable) -> TextTable | None:
    """Tabulate published values and our differences, for rows whose model and schedule the paper prints; None if none.

    A value that ours is not compared with is followed by the numbers of the reasons, which are the table's notes.
    """
    rows = [row for row in model.rows if row.published is not None and row.runs]
    if not rows:
        return None
    columns = ("schedule", "published row", *(model.column(task) for task in model.tasks), "Rel")
    reasons: dict[str, int] = {}

    def gap(value: float | None, unlike: Sequence[str], decimals: int) -> str:
        numbers = [reasons.setdefault(reason, len(reasons) + 1) for reason in unlike]
        return f"({', '.join(map(str, sorted(numbers)))})" if numbers else number(value, decimals, True)

    lines = []
    for row in rows:
        printed = row.published
        assert printed is not None  # guaranteed by the filter of `rows`
        cells = [label(row), f"{printed.name} {printed.budget}".strip()]
        for task in model.tasks:
            cell, decimals = row.cells.get(task, ScoreCell(0.0)), digits(task)
            cells.append(f"{number(cell.published, decimals)} {gap(cell.delta, cell.unlike, decimals)}".strip())
        difference = None if row.rel is None else row.rel - printed.rel
        lines.append(Line((*cells, f"{printed.rel:.1f} {gap(difference, row.unlike, 1)}".strip())))
    notes = tuple(f"({index}) not compared: {reason.rstrip('.')}." for reason, index in reasons.items())
    return TextTable(f"{model.title}: published values, and ours minus these", columns, tuple(lines), notes)
