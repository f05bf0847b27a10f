"""The paper's Table 3 (arXiv 2512.07580): what a schedule costs on TextVQA, ours beside the printed figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

from lmms_prune.leaderboard.grids import Line, TextTable, label, number, without_empty_columns
from lmms_prune.leaderboard.published import PublishedCost, cost_of
from lmms_prune.leaderboard.rows import BenchTimes, Leaderboard, ModelTable, TableRow

TITLE = "Table 3 of arXiv 2512.07580"
TEXTVQA = ("prune_textvqa_ocr", "textvqa_val")  # the paper's protocol first
_COLUMNS = (
    *("schedule", "printed row", "tokens", "printed", "TFLOPs", "printed", "KV MiB", "printed"),
    *("CUDA ms", "printed", "latency ms", "printed", "TextVQA", "printed"),
)
_FIGURES = {"tokens": 0, "tflops": 2, "mib": 1, "cuda_ms": 1, "latency_ms": 1, "acc": 1}
"""The figures of a row, as fields of `MeasuredCost` and `PublishedCost`, with the decimals that are shown."""
_PRINTED = (
    "Printed: one A6000, batch 1, 116.4 text tokens on average, FLOPs and cache of the decoder's prefill; the printed tokens "
    "are nominal, and neither time is defined."
)
OUR_TIMES = (
    "Ours: CUDA ms is the decoder's prefill with the selection, on a CPU its CPU time; latency is the whole answer, "
    "vision encoder and decoding included."
)


@dataclass(frozen=True)
class MeasuredCost:
    """One schedule's measured cost per document, in the units of `PublishedCost`; None for what was not measured."""

    schedule: str
    printed: PublishedCost
    tokens: float | None = None
    tflops: float | None = None
    mib: float | None = None
    cuda_ms: float | None = None
    latency_ms: float | None = None
    acc: float | None = None


def paper_costs(model: ModelTable, board: Leaderboard) -> TextTable | None:
    """Return the Table 3 of one model of a leaderboard: rows beside the printed ones, or the printed table by itself."""
    printed = [row for row in board.published_costs if row.model == model.model]
    return printed_table(printed) if printed else beside_printed(model, board.times)


def beside_printed(model: ModelTable, times: BenchTimes | None) -> TextTable | None:
    """Tabulate the cost of a leaderboard's rows beside the printed one; None if the paper prints none of them.

    Tokens, FLOPs and cache are those of TextVQA alone. An evaluation has no times that could be compared: they are those
    that ``bench`` measured.
    """
    measured = [(row, costs) for row in model.rows if (costs := measured_cost(row, times)) is not None]
    if not measured:
        return None
    notes = [] if times is None else [f"{OUR_TIMES} Measured by bench: {times.source}."]
    for row, costs in measured:
        unlike = next((row.cells[task].unlike for task in TEXTVQA if task in row.cells), ())
        if unlike:
            notes.append(f"{costs.schedule}: its TextVQA is not comparable with the printed one: {'; '.join(unlike)}.")
    return cost_table([costs for _, costs in measured], f"{model.title}: {TITLE}", notes)


def measured_cost(row: TableRow, times: BenchTimes | None) -> MeasuredCost | None:
    """Return what a row cost on TextVQA; None if that is not known, or the paper's Table 3 does not have the row."""
    printed = cost_of(row.published)
    task = next((name for name in TEXTVQA if name in row.cells), None)
    if printed is None or task is None or not row.runs:
        return None
    totals = [totals for run in row.runs if (totals := run.tasks[task].accounting) is not None]
    if len(totals) < len(row.runs):
        return None
    total = reduce(add, totals)
    costs = total.costs()
    cuda_ms, latency_ms = (None, None) if times is None else times.of(row.runs[0].schedule)
    return MeasuredCost(
        label(row),
        printed,
        tokens=total.avg_visual_tokens,
        tflops=costs["selection_tflops"] + costs["prefill_tflops"],
        mib=costs["kv_mib"],
        cuda_ms=cuda_ms,
        latency_ms=latency_ms,
        acc=row.score(task),
    )


def cost_columns(row: TableRow, times: BenchTimes | None) -> dict[str, Any]:
    """Return a row's figures of Table 3 as CSV columns, measured and printed; none if the paper does not print the row."""
    if (printed := cost_of(row.published)) is None:
        return {}
    measured = measured_cost(row, times)
    columns: dict[str, Any] = {"table3_row": printed.label}
    for name in _FIGURES:
        columns[f"table3_{name}"] = None if measured is None else getattr(measured, name)
        columns[f"table3_{name}_published"] = getattr(printed, name)
    return columns


def cost_table(rows: Sequence[MeasuredCost], title: str, notes: Sequence[str] = ()) -> TextTable:
    """Tabulate measured costs beside the printed ones."""
    lines = [Line((row.schedule, row.printed.label, *_cells(row))) for row in rows]
    grid = without_empty_columns(TextTable(title, _COLUMNS, tuple(lines)))
    return TextTable(grid.title, grid.columns, grid.lines, (_PRINTED, *notes))


def printed_table(costs: Sequence[PublishedCost]) -> TextTable:
    """Tabulate rows of the printed Table 3 alone."""
    columns = ("schedule", "tokens", "TFLOPs", "KV MiB", "CUDA ms", "latency ms", "TextVQA")
    lines = [
        Line((row.label, *(number(getattr(row, name), digits) for name, digits in _FIGURES.items()))) for row in costs
    ]
    return TextTable(f"{costs[0].model}, {TITLE}", columns, tuple(lines), (_PRINTED,))


def _cells(row: MeasuredCost) -> list[str]:
    """Return each measured figure and the printed one beside it; both are empty where nothing was measured."""
    cells = []
    for name, digits in _FIGURES.items():
        measured, printed = getattr(row, name), getattr(row.printed, name)
        cells += ["", ""] if measured is None else [number(measured, digits), number(printed, digits)]
    return cells
