"""Footnotes of the tables: the meaning of marks and columns, and what was left out."""

from __future__ import annotations

from lmms_prune.leaderboard.grids import letters
from lmms_prune.leaderboard.rows import ALPHA, Leaderboard


def footnotes(board: Leaderboard, with_details: bool) -> list[str]:
    """Return all footnotes: marks, columns, baselines and controls, and missing numbers."""
    return [*(f"{letter}: {mark}." for mark, letter in letters(board).items()), *explanations(board, with_details)]


def explanations(board: Leaderboard, with_details: bool) -> list[str]:
    """Return the footnotes without those of marks."""
    lines = []
    for model in board.models:
        lines += [f"{model.title}: {note}" for note in model.notes]
        if model.missing:
            count = "1 number is" if model.missing == 1 else f"{model.missing} numbers are"
            lines.append(f"{model.title}: {count} missing; Acc and Rel stay blank without.")
    rows = [row for model in board.models for row in model.rows]
    if any(row.rel_interval for row in rows):
        lines.append(f"Intervals: 95 %, percentiles of {board.resamples} paired resamples of documents and seeds.")
    compared = max((sum(cell.comparison is not None for cell in row.cells.values()) for row in rows), default=0)
    if compared and 2 * compared / (board.resamples + 1) >= ALPHA:
        # The smallest p value of resampling is 2 / (resamples + 1); Holm's correction multiplies it by the benchmarks.
        lines.append(
            f"{board.resamples} resamples may be too few to find a change real in one of {compared} benchmarks: "
            f"--resamples {int(2 * compared / ALPHA)} or more."
        )
    if any(row.above_blind is not None for row in rows):
        lines.append(_ABOVE_BLIND)
    if with_details:
        lines.append(_DETAILS)
    if board.ignored:
        lines.append(f"Tasks without a score that can be a column: {', '.join(board.ignored)}.")
    return lines


MARKED = (
    "▲ and ▼ at a score, and “better” or “worse”: a real change from the unpruned run, p < 0.05 after Holm's correction for "
    "the row's benchmarks; △ and ▽: p < 0.05 before the correction only."
)
_ABOVE_BLIND = (
    "Above blind: (score - blind) / (unpruned - blind) in percent, of a row the mean over the benchmarks on which the "
    "unpruned model is distinguishably better than blind."
)
_DETAILS = (
    "p, Holm: McNemar's exact test where a score counts right answers and both sides are one run, else by resampling; "
    "corrected for the row's benchmarks. Lost, gained: units (documents, MME's images, MMBench's circular groups) that turned wrong or right, of so many; "
    "same %: documents with the same answer; detectable: the smallest true change found with 80 % power at a two-sided "
    "5 %, (1.96 + 0.84) standard errors; random +: the score minus that of the random control."
)
