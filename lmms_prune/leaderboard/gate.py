"""A CI gate: rows are checked against limits, with reasons and a Markdown summary for a pull request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.formats import markdown_grid
from lmms_prune.leaderboard.grids import Line, TextTable, between, digits, label, number
from lmms_prune.leaderboard.rows import CONTROL, ORACLE, STOCK, UNPRUNED, Leaderboard, ModelTable, TableRow

_REAL = "real is p < 0.05 after Holm's correction for the row's benchmarks, of Rel a 95 % interval without 100"


@dataclass(frozen=True)
class Limits:
    """Limits that a row must meet.

    Args:
        min_rel: the least Rel, in percent.
        max_drop: the largest drop below the baseline, in points of the paper's scale, by the tasks of a benchmark.
        significant: only a real loss breaks a limit (Rel: one whose interval excludes zero); without samples the measured
            number decides.
        strict: a marked row fails.
        verify: all rows were verified; a row with an unverified number fails.
    """

    min_rel: float | None = None
    max_drop: Mapping[tuple[str, ...], float] | None = None
    significant: bool = False
    strict: bool = False
    verify: bool = False


@dataclass(frozen=True)
class LimitCheck:
    """The outcome of one limit for one row.

    Args:
        what, limit, measured, interval: as texts.
        failed: whether the row breaks it.
        remark: further information, or "".
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
    """Check rows against limits: by default all but baselines, controls and oracles.

    Args:
        board: the table.
        limits: the limits to meet.
        schedules: only rows of these schedules, as executed; they may be controls or oracles.
    """
    judgements = []
    for model in board.models:
        for row in model.rows:
            wanted = row.kind not in (CONTROL, ORACLE) if schedules is None else row.runs[0].schedule in schedules
            if wanted and (row.baseline is not None or _without_baseline(model)):
                judgements.append(Judgement(model.title, row, tuple(_checks(model, row, limits))))
    return judgements


def _without_baseline(model: ModelTable) -> bool:
    """Tell whether the model has no baseline at all; then no row can be judged, and each fails."""
    return all(row.baseline is None and row.rel is None for row in model.rows)


def _checks(model: ModelTable, row: TableRow, limits: Limits) -> Iterator[LimitCheck]:
    if limits.min_rel is not None:
        rel_interval = row.rel_interval
        broken = row.rel is not None and row.rel < limits.min_rel
        span = "" if rel_interval is None else between(100 + rel_interval.low, 100 + rel_interval.high)
        texts = ("Rel", f"at least {limits.min_rel:g}", number(row.rel), span)
        real = None if rel_interval is None else rel_interval.excludes_zero
        yield _check(texts, row.rel is None, broken, real, limits, _no_rel(model, row))
    for tasks, most in (limits.max_drop or {}).items():
        present = [task for task in tasks if task in model.tasks] or [tasks[0]]
        for task in present:
            cell = row.cells.get(task)
            sign = TASKS[task].sign
            drop = None if cell is None or cell.unpruned is None else sign * (cell.unpruned - cell.score)
            comparison = None if cell is None else cell.comparison
            difference = None if comparison is None else comparison.difference
            ends = () if difference is None else sorted(-sign * end for end in (difference.low, difference.high))
            span = between(*ends) if ends else ""
            name = model.column(task) if task in model.tasks else TASKS[task].name
            texts = (
                f"{name}, {'drop' if sign > 0 else 'rise'}",
                f"at most {most:g}",
                number(drop, max(1, digits(task))),
                span,
            )
            real = None if comparison is None else comparison.real
            yield _check(texts, drop is None, drop is not None and drop > most, real, limits)
    rows = {row.label: row for row in model.rows}
    baseline_faults = rows[row.baseline].faults if row.baseline in rows else ()
    if faults := [*row.faults, *(f"its baseline: {fault}" for fault in baseline_faults)]:
        count = "1 contradiction" if len(faults) == 1 else f"{len(faults)} contradictions"
        yield LimitCheck("scores", "no contradictions", count, "", True, "; ".join(faults))
    if unverified := [*row.unverified, *(f"its baseline: {reason}" for reason in _unverified_baseline(rows, row))]:
        count = "1 is not" if len(unverified) == 1 else f"{len(unverified)} are not"
        yield LimitCheck("verified", "every number", count, "", True, "; ".join(unverified))
    if limits.strict:
        count = "1 mark" if len(row.marks) == 1 else f"{len(row.marks)} marks"
        yield LimitCheck("comparable", "no marks", count, "", bool(row.marks), "; ".join(row.marks))


def _unverified_baseline(rows: Mapping[str, TableRow], row: TableRow) -> tuple[str, ...]:
    return () if row.baseline is None or row.baseline not in rows else rows[row.baseline].unverified


def _no_rel(model: ModelTable, row: TableRow) -> str:
    """Say why a row has no Rel, if only tasks were evaluated that do not count, or its baseline scores 0; "" otherwise."""
    if row.uncounted and not row.missing:
        return f"its baseline scores 0 on {', '.join(TASKS[task].name for task in row.uncounted)}"
    if row.acc is not None or any(TASKS[task].counts for task in model.tasks) or not model.tasks:
        return ""
    return f"none of its tasks counts in Rel: --count {','.join(model.tasks)} counts them, --max-drop judges one"


def _check(
    texts: tuple[str, str, str, str],
    absent: bool,
    broken: bool,
    real: bool | None,
    limits: Limits,
    reason: str = "",
) -> LimitCheck:
    """Return the outcome of a limit; `real` tells whether there is a real change, None if no samples tell."""
    if absent:
        return LimitCheck(*texts, failed=True, remark=reason or "there is no number to compare")
    indistinguishable = real is False
    remark = "not distinguishable from no loss" if indistinguishable else ""
    if limits.significant and broken and real is None:
        remark = "no samples to tell chance from loss; the number decides"
    return LimitCheck(*texts, failed=broken and not (limits.significant and indistinguishable), remark=remark)


def summary(judgements: Sequence[Judgement], board: Leaderboard, limits: Limits) -> str:
    """Return the result in Markdown: a verdict, a table, the reasons, and files that could not be read."""
    failed = [judgement for judgement in judgements if judgement.failed]
    passed = judgements and not failed and not board.problems
    count = f"{len(failed)} of {len(judgements)} judged rows failed. " if judgements else ""
    lines = [f"## lmms-prune gate: {'passed' if passed else 'failed'}", "", f"{count}{_rule(limits)}", ""]
    against = dict.fromkeys(
        f"{judgement.model}: `{judgement.row.baseline}`" for judgement in judgements if judgement.row.baseline
    )
    lines += [f"Compared with {'; '.join(against)}.", ""] if against else []
    rows = tuple(
        Line(
            (
                label(judgement.row),
                judgement.model,
                c.what,
                c.limit,
                c.measured,
                c.interval,
                "FAIL" if c.failed else "ok",
                c.remark,
            )
        )
        for judgement in judgements
        for c in judgement.checks
    )
    columns = ("schedule", "model", "check", "limit", "measured", "95 %", "result", "remark")
    lines += [markdown_grid(TextTable("Checks", columns, rows))] if rows else []
    if not judgements:
        lines.append(f"* FAIL: there is no row to judge{_nothing_to_judge(board)}")
    for judgement in failed:
        reasons = "; ".join(f"{c.what} {c.measured or 'unknown'}, {c.limit}" for c in judgement.checks if c.failed)
        lines.append(f"* FAIL: {judgement.model}, `{judgement.row.label}`: {reasons}.")
    lines += [f"* FAIL: {problem}" for problem in board.problems]
    for judgement in judgements:
        if judgement.row.uncounted and limits.min_rel is not None:
            names = ", ".join(TASKS[task].name for task in judgement.row.uncounted)
            lines.append(
                f"* Note: {judgement.model}, `{judgement.row.label}`: its baseline scores 0 on {names}: not in Rel."
            )
    if not limits.verify:
        lines.append("* Note: the numbers were not verified (--no-verify).")
    if not limits.strict:
        lines += [
            f"* Note: {judgement.model}, `{judgement.row.label}`: {'; '.join(judgement.row.marks)}."
            for judgement in judgements
            if judgement.row.marks
        ]
    return "\n".join(lines) + "\n"


def _nothing_to_judge(board: Leaderboard) -> str:
    """Return the reason why no row of a leaderboard is judged, after "there is no row to judge"."""
    rows = [row for model in board.models for row in model.rows]
    if not rows:
        named = ", ".join(board.ignored)
        return f": the tasks {named} have no score of each document." if named else ": no results could be read."
    kinds = dict.fromkeys(row.kind for row in rows)
    if set(kinds) <= {UNPRUNED, STOCK}:
        return ": all rows are unpruned runs, which others are compared with."
    if set(kinds) <= {CONTROL, ORACLE, UNPRUNED, STOCK}:
        names = ", ".join(dict.fromkeys(f"`{row.label}`" for row in rows if row.kind in (CONTROL, ORACLE)))
        return f": besides baselines there are only controls and oracles ({names}); name one with --schedule."
    return ": no row is one of --schedule, or those are without a baseline."


def _rule(limits: Limits) -> str:
    if limits.significant:
        return f"A limit is broken only by a real loss (--significant): {_REAL}."
    return f"The measured numbers decide; losses that are not real are named as not distinguishable ({_REAL})."
