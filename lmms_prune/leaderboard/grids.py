"""What is printed, before any format: headings, rows of texts, and which of them are bold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.entries import ORACLE
from lmms_prune.leaderboard.rows import Against, BudgetGroup, Leaderboard, ModelTable, ScoreCell, TableRow
from lmms_prune.schedule.presets import PRESETS

_LONG = 3  # stages that a label shows; a longer schedule is named by its preset or by its number of stages


@dataclass(frozen=True)
class Line:
    """One row of a grid: texts, and which of them are bold; or a heading over the rows that follow."""

    cells: tuple[str, ...] = ()
    bold: frozenset[int] = frozenset()
    heading: str = ""


@dataclass(frozen=True)
class TextTable:
    """A table of texts; the first column is to the left, the others to the right. Notes come after it."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()


def grids(board: Leaderboard, with_details: bool) -> Iterator[TextTable]:
    """All that a reader sees of the models, in order."""
    names = letters(board)
    for model in board.models:
        yield scores(model)
        if any(row.runs for row in model.rows):
            yield cost(model)
            if len((sure := confidence(model, names)).columns) > 1:
                yield sure
        if (beside := reproduction(model)) is not None:
            yield beside
        if with_details:
            yield from (details(row, model) for row in model.rows if row.baseline is not None)


def only_columns(grid: TextTable, kept: Sequence[int]) -> TextTable:
    """The grid with some of its columns."""
    lines = (
        Line(
            tuple(line.cells[i] for i in kept if line.cells),
            frozenset(place for place, i in enumerate(kept) if i in line.bold),
            line.heading,
        )
        for line in grid.lines
    )
    return TextTable(grid.title, tuple(grid.columns[i] for i in kept), tuple(lines), grid.notes)


def without_empty_columns(grid: TextTable) -> TextTable:
    """The grid without columns in which nothing stands."""
    lines = [line for line in grid.lines if line.cells]
    return only_columns(grid, [i for i in range(len(grid.columns)) if any(line.cells[i] for line in lines)])


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """A number of a cell; nothing where there is none."""
    # Adding 0 takes the sign from a zero.
    return "" if value is None else f"{round(value, digits) + 0.0:{'+' if sign else ''}.{digits}f}"


def digits(task: str) -> int:
    """Decimals of a score, as the paper prints them."""
    return 0 if TASKS[task].whole > 100 else 1


def label(row: TableRow) -> str:
    """The row's schedule, short enough for a table, with its seeds if they are several; an oracle is called one."""
    schedule, *more = row.label.split(" (", 1)
    stages = schedule.split(",")
    if len(stages) > _LONG:
        names = [name for name, text in PRESETS.items() if text == schedule]
        schedule = names[0] if names else f"{stages[0]}, … ({len(stages)} stages)"
    text = " (".join([schedule, *more]) + (" [oracle]" if row.kind == ORACLE else "")
    return f"{text} × {len(row.seeds)} seeds" if len(row.seeds) > 1 else text


def letters(board: Leaderboard) -> dict[str, str]:
    """A short name for every mark of the board: a to z, then aa and so on."""
    found = list(dict.fromkeys(mark for _, row in board.marked for mark in row.marks))
    return {mark: ("" if i < 26 else chr(96 + i // 26)) + chr(97 + i % 26) for i, mark in enumerate(found)}


def scores(model: ModelTable) -> TextTable:
    """Every benchmark, Acc and Rel; the best of each budget is bold."""
    columns = ("schedule", "tokens", *(model.column(task) for task in model.tasks), "Acc", "Rel")
    lines: list[Line] = []
    for budget in model.budgets:
        lines.append(Line(heading=budget.title))
        best = _best(budget, model.tasks)
        for row in budget.rows:
            cells = [label(row), number(row.cost.avg_visual_tokens, 0)]
            for task in model.tasks:
                spread = row.cells[task].sd if task in row.cells else None
                cells.append(_with_spread(row.score(task), spread, digits(task)))
            cells += [number(row.acc), _with_spread(row.rel, row.rel_sd, 1)]
            values = [None, None, *(row.score(task) for task in model.tasks), row.acc, row.rel]
            bold = {i for i, value in enumerate(values) if value is not None and best.get(i) == _shown(i, value, model)}
            lines.append(Line(tuple(cells), frozenset() if row.kind == ORACLE else frozenset(bold)))
    return without_empty_columns(TextTable(model.title, columns, tuple(lines)))


def _with_spread(value: float | None, spread: float | None, places: int) -> str:
    return number(value, places) + ("" if spread is None else f" ±{spread:.{places}f}")


def _shown(column: int, value: float, model: ModelTable) -> float:
    """A value as printed: what looks alike is equally good."""
    places = digits(model.tasks[column - 2]) if column - 2 < len(model.tasks) else 1
    return round(value, places)


def _best(budget: BudgetGroup, tasks: Sequence[str]) -> dict[int, float]:
    """By column, the largest printed number where at least two rows have one; oracles do not compete."""
    best = {}
    getters = [*((lambda row, task=task: row.score(task)) for task in tasks), lambda row: row.acc, lambda row: row.rel]
    for i, get in enumerate(getters):
        values = [value for row in budget.rows if row.kind != ORACLE and (value := get(row)) is not None]
        if len(values) > 1:
            best[i + 2] = round(max(values), digits(tasks[i]) if i < len(tasks) else 1)
    return best


def cost(model: ModelTable) -> TextTable:
    """What each row costs, and what that is of its baseline."""
    columns = ("schedule", "tokens", "%", "KV MiB", "%", "TFLOPs", "%", "samples/s", "%")
    lines: list[Line] = []
    notes = []
    for budget in model.budgets:
        lines.append(Line(heading=budget.title))
        for row in budget.rows:
            one = row.cost
            cells = [number(one.avg_visual_tokens, 0), number(one.share_tokens, 0)]
            cells += [_three(one.kv_mib), number(one.share_kv, 0)]
            cells += [_three(one.prefill_tflops), number(one.share_flops, 0)]
            cells += [_three(one.samples_per_second), number(one.share_speed, 0) or one.unlike]
            if one.no_share_speed:
                notes.append(f"{label(row)}: its speed is no share of the baseline's: {one.no_share_speed}.")
            lines.append(Line((label(row), *cells)))
    devices = sorted({row.cost.device for row in model.rows if row.cost.device})
    title = f"{model.title}: cost on {'; '.join(devices)}"
    return without_empty_columns(TextTable(title, columns, tuple(lines), tuple(notes)))


def confidence(model: ModelTable, names: dict[str, str]) -> TextTable:
    """How sure each row's Rel is, how it stands against blind and random, and its marks by their letters."""
    columns = ("schedule", "Rel", "95 %", "above blind", "against random", "by, 95 %", "marks")
    lines: list[Line] = []
    for budget in model.budgets:
        lines.append(Line(heading=budget.title))
        for row in budget.rows:
            sure = row.rel_interval
            span = "" if sure is None else between(100 + sure.low, 100 + sure.high)
            marks = " ".join(names[mark] for mark in row.marks)
            cells = (number(row.rel), span, number(row.above_blind), *against(row.random), marks)
            lines.append(Line((label(row), *cells)))
    return without_empty_columns(TextTable(f"{model.title}: confidence", columns, tuple(lines)))


def _three(value: float | None) -> str:
    """Three digits, and no powers of ten where a few more zeros say it."""
    return (
        ""
        if value is None
        else f"{value:.0f}"
        if value >= 100
        else f"{float(f'{value:.3g}'):.6f}".rstrip("0").rstrip(".")
    )


def between(low: float, high: float) -> str:
    """An interval."""
    return f"{number(low)} to {number(high)}"


def against(found: Against | None) -> tuple[str, str]:
    """A verdict, and its difference with the interval; nothing where there is nothing to compare with."""
    if found is None:
        return "", ""
    difference = found.difference
    return found.verdict, f"{number(difference.value, 1, True)} ({between(difference.low, difference.high)})"


DETAILS = (
    *("benchmark", "score", "change", "95 %", "p, Holm", "lost", "gained", "of", "same %", "detectable"),
    *("kept %", "above blind", "random +, 95 %"),
)


def details(row: TableRow, model: ModelTable) -> TextTable:
    """All statistics of one row, a benchmark a line."""
    lines: list[Line] = []
    notes = []
    for task in model.tasks:
        if task not in row.cells:
            lines.append(Line((model.column(task), *[""] * (len(DETAILS) - 1))))
            continue
        cell, places = row.cells[task], digits(task)
        found = [""] * 8
        if (one := cell.comparison) is not None:
            flips = [f"{one.worse:g}", f"{one.better:g}", str(one.units), number(one.agreement)]
            found = [number(one.difference.value, places, True), between(one.difference.low, one.difference.high)]
            found += [f"{one.p_holm:.3f}", *flips, number(one.detectable, places)]
        shares = [number(cell.retention), number(cell.above_blind), against(cell.random)[1]]
        lines.append(Line((model.column(task), number(cell.score, places), *found, *shares)))
        if cell.extras:
            said = ", ".join(f"{name} {value:.1f}" for name, value in cell.extras.items())
            notes.append(f"{model.column(task)}: {said}.")
    return without_empty_columns(TextTable(f"{model.title}, {label(row)}", DETAILS, tuple(lines), tuple(notes)))


def reproduction(model: ModelTable) -> TextTable | None:
    """Ours beside the published values, where model and schedule are those of a printed row; None if none is."""
    rows = [row for row in model.rows if row.published is not None and row.runs]
    if not rows:
        return None
    columns = ("schedule", "published row", *(model.column(task) for task in model.tasks), "Rel")
    lines = []
    for row in rows:
        printed = row.published
        assert printed is not None  # `rows` are those that have one
        cells = [label(row), f"{printed.name} {printed.budget}".strip()]
        for task in model.tasks:
            cell = row.cells.get(task, ScoreCell(0.0))
            cells.append(f"{number(cell.published, digits(task))} {number(cell.delta, digits(task), True)}".strip())
        gap = None if row.rel is None else row.rel - printed.rel
        lines.append(Line((*cells, f"{printed.rel:.1f} {number(gap, 1, True)}".strip())))
    return TextTable(f"{model.title}: published values, and ours minus these", columns, tuple(lines))
