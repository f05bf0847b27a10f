"""The paper's Table 3 (arXiv 2512.07580): what a schedule costs on TextVQA, ours beside the printed figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from lmms_prune.leaderboard.grids import Line, TextTable, label, number, without_empty_columns
from lmms_prune.leaderboard.published import PublishedCost, match_cost
from lmms_prune.leaderboard.rows import ModelTable, TableRow

TITLE = "Table 3 of arXiv 2512.07580"
TEXTVQA = ("prune_textvqa_ocr", "textvqa_val")  # the paper's protocol first
_COLUMNS = (
    *("schedule", "printed row", "tokens", "printed", "TFLOPs", "printed", "KV MiB", "printed"),
    *("CUDA ms", "printed", "latency ms", "printed", "TextVQA", "printed"),
)
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


def beside_printed(model: ModelTable) -> TextTable | None:
    """Tabulate the cost of a leaderboard's rows beside the printed one; None if the paper prints none of them.

    Tokens, FLOPs and cache are those of TextVQA alone. A leaderboard has no times that could be compared.
    """
    rows = [measured for row in model.rows if (measured := _measured(row)) is not None]
    return cost_table(rows, f"{model.title}: {TITLE}") if rows else None


def _measured(row: TableRow) -> MeasuredCost | None:
    """Return what a row cost on TextVQA; None if that is not known, or the paper does not print the row."""
    printed = match_cost(row.runs[0].model, row.runs[0].schedule) if row.runs else None
    task = next((name for name in TEXTVQA if name in row.cells), None)
    if printed is None or task is None:
        return None
    totals = [totals for run in row.runs if (totals := run.tasks[task].accounting) is not None]
    if len(totals) < len(row.runs):
        return None
    total = reduce(add, totals)
    costs = total.costs()
    return MeasuredCost(
        label(row),
        printed,
        tokens=total.avg_visual_tokens,
        tflops=costs["selection_tflops"] + costs["prefill_tflops"],
        mib=costs["kv_mib"],
        acc=row.score(task),
    )


def cost_table(rows: Sequence[MeasuredCost], title: str, notes: Sequence[str] = ()) -> TextTable:
    """Tabulate measured costs beside the printed ones."""
    lines = [Line((row.schedule, row.printed.label, *_cells(row))) for row in rows]
    grid = without_empty_columns(TextTable(title, _COLUMNS, tuple(lines)))
    return TextTable(grid.title, grid.columns, grid.lines, (_PRINTED, *notes))


def printed_table(costs: Sequence[PublishedCost]) -> TextTable:
    """Tabulate rows of the printed Table 3 alone."""
    columns = ("schedule", "tokens", "TFLOPs", "KV MiB", "CUDA ms", "latency ms", "TextVQA")
    lines = []
    for row in costs:
        figures = (
            number(row.tokens, 0),
            number(row.tflops, 2),
            *map(number, (row.mib, row.cuda_ms, row.latency_ms, row.acc)),
        )
        lines.append(Line((row.label, *figures)))
    return TextTable(f"{costs[0].model}, {TITLE}", columns, tuple(lines), (_PRINTED,))


def _cells(row: MeasuredCost) -> list[str]:
    """Return each measured figure and the printed one beside it; both are empty where nothing was measured."""
    printed = row.printed
    pairs = (
        (row.tokens, printed.tokens, 0),
        (row.tflops, printed.tflops, 2),
        (row.mib, printed.mib, 1),
        (row.cuda_ms, printed.cuda_ms, 1),
        (row.latency_ms, printed.latency_ms, 1),
        (row.acc, printed.acc, 1),
    )
    cells = []
    for ours, theirs, digits in pairs:
        cells += ["", ""] if ours is None else [number(ours, digits), number(theirs, digits)]
    return cells
