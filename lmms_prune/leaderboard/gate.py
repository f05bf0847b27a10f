"""A gate for CI: rows against limits, with the reasons, and a summary fit for a pull request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.entries import CONTROL, ORACLE
from lmms_prune.leaderboard.formats import markdown_grid
from lmms_prune.leaderboard.grids import Line, TextTable, between, digits, label, number
from lmms_prune.leaderboard.rows import Leaderboard, ModelTable, TableRow
from lmms_prune.leaderboard.statistics import Interval


@dataclass(frozen=True)
class Limits:
    """What a row must keep.

    Args:
        min_rel: the least Rel, in percent.
        max_drop: the largest drop below the baseline, in points of the paper's scale, by the tasks of a benchmark.
        significant: a limit is broken only by what is also distinguishable from no loss at all; without samples, which
            could tell, the number itself decides.
        strict: a marked row fails.
    """

    min_rel: float | None = None
    max_drop: Mapping[tuple[str, ...], float] | None = None
    significant: bool = False
    strict: bool = False


@dataclass(frozen=True)
class LimitCheck:
    """One limit and one row.

    Args:
        what, limit, measured, interval: as texts.
        failed: whether the row breaks it.
        remark: "" or what else is to be known.
    """

    what: str
    limit: str
    measured: str
    interval: str
    failed: bool
    remark: str = ""


@dataclass(frozen=True)
class Judgement:
    """All checks of one row."""

    model: str
    row: TableRow
    checks: tuple[LimitCheck, ...]

    @property
    def failed(self) -> bool:
        return any(check.failed for check in self.checks)


def judged(board: Leaderboard, limits: Limits, schedules: Sequence[str] | None = None) -> list[Judgement]:
    """Hold rows against limits: by default all but baselines, controls and oracles.

    Args:
        board: the table.
        limits: what to keep.
        schedules: only rows of these schedules, as executed; they may be controls or oracles.
    """
    found = []
    for model in board.models:
        for row in model.rows:
            mine = row.kind not in (CONTROL, ORACLE) if schedules is None else row.runs[0].schedule in schedules
            if mine and (row.baseline is not None or _lonely(model)):
                found.append(Judgement(model.title, row, tuple(_checks(model, row, limits))))
    return found


def _lonely(model: ModelTable) -> bool:
    """Whether there is no baseline, so that no row can be judged: each fails then."""
    return all(row.baseline is None and row.rel is None for row in model.rows)


def _checks(model: ModelTable, row: TableRow, limits: Limits) -> Iterator[LimitCheck]:
    if limits.min_rel is not None:
        shifted = row.rel_interval
        broken = row.rel is not None and row.rel < limits.min_rel
        span = "" if shifted is None else between(100 + shifted.low, 100 + shifted.high)
        about = ("Rel", f"at least {limits.min_rel:g}", number(row.rel), span)
        yield _check(about, row.rel is None, broken, shifted, limits)
    for tasks, most in (limits.max_drop or {}).items():
        there = [task for task in tasks if task in model.tasks] or [tasks[0]]
        for task in there:
            cell = row.cells.get(task)
            drop = None if cell is None or cell.unpruned is None else cell.unpruned - cell.score
            difference = None if cell is None or cell.comparison is None else cell.comparison.difference
            span = "" if difference is None else between(-difference.high, -difference.low)
            name = model.column(task) if task in model.tasks else TASKS[task].name
            about = (f"{name}, drop", f"at most {most:g}", number(drop, max(1, digits(task))), span)
            yield _check(about, drop is None, drop is not None and drop > most, difference, limits)
    labels = {one.label: one for one in model.rows}
    beside = labels[row.baseline].faults if row.baseline in labels else ()
    if faults := [*row.faults, *(f"its baseline: {fault}" for fault in beside)]:
        many = "1 contradiction" if len(faults) == 1 else f"{len(faults)} contradictions"
        yield LimitCheck("scores", "no contradictions", many, "", True, "; ".join(faults))
    if limits.strict:
        many = "1 mark" if len(row.marks) == 1 else f"{len(row.marks)} marks"
        yield LimitCheck("comparable", "no marks", many, "", bool(row.marks), "; ".join(row.marks))


def _check(
    about: tuple[str, str, str, str], absent: bool, broken: bool, difference: Interval | None, limits: Limits
) -> LimitCheck:
    if absent:
        return LimitCheck(*about, failed=True, remark="there is no number to compare")
    unsure = difference is not None and not difference.excludes_zero
    remark = "not distinguishable from no loss" if unsure else ""
    if limits.significant and broken and difference is None:
        remark = "no samples to tell chance from loss; the number decides"
    return LimitCheck(*about, failed=broken and not (limits.significant and unsure), remark=remark)


def summary(found: Sequence[Judgement], board: Leaderboard, limits: Limits) -> str:
    """The result in Markdown: a verdict, a table, the reasons, and what could not be read."""
    failed = [one for one in found if one.failed]
    passed = found and not failed and not board.problems
    count = f"{len(failed)} of {len(found)} judged rows failed. " if found else ""
    lines = [f"## lmms-prune gate: {'passed' if passed else 'failed'}", "", f"{count}{_rule(limits)}", ""]
    against = dict.fromkeys(f"{one.model}: `{one.row.baseline}`" for one in found if one.row.baseline)
    lines += [f"Compared with {'; '.join(against)}.", ""] if against else []
    rows = tuple(
        Line(
            (label(one.row), one.model, c.what, c.limit, c.measured, c.interval, "FAIL" if c.failed else "ok", c.remark)
        )
        for one in found
        for c in one.checks
    )
    columns = ("schedule", "model", "check", "limit", "measured", "95 %", "result", "remark")
    lines += [markdown_grid(TextTable("Checks", columns, rows))] if rows else []
    if not found:
        hint = "" if board.problems else " There are only baselines and controls; name one with --schedule."
        lines.append(f"* FAIL: there is no row to judge.{hint}")
    for one in failed:
        said = "; ".join(f"{c.what} {c.measured or 'unknown'}, {c.limit}" for c in one.checks if c.failed)
        lines.append(f"* FAIL: {one.model}, `{one.row.label}`: {said}.")
    lines += [f"* FAIL: {problem}" for problem in board.problems]
    for one in found:
        if one.row.uncounted and limits.min_rel is not None:
            names = ", ".join(TASKS[task].name for task in one.row.uncounted)
            lines.append(f"* Note: {one.model}, `{one.row.label}`: its baseline scores 0 on {names}: not in Rel.")
    if not limits.strict:
        lines += [
            f"* Note: {one.model}, `{one.row.label}`: {'; '.join(one.row.marks)}." for one in found if one.row.marks
        ]
    return "\n".join(lines) + "\n"


def _rule(limits: Limits) -> str:
    if limits.significant:
        return "A limit is broken only by a loss whose 95 % interval excludes zero (--significant)."
    return "The measured numbers decide; losses whose 95 % interval includes zero are named as not distinguishable."
