"""The tables of the report: our numbers beside the printed ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.grids import digits, number
from lmms_prune.leaderboard.published import PublishedCost, PublishedRow, published
from lmms_prune.leaderboard.rows import TableRow
from lmms_prune.reproduce.evidence import Evidence


@dataclass(frozen=True)
class ReportTable:
    """A table whose cells have our number above and the printed one below.

    Args:
        title: its heading.
        columns: the headings; the first column has the rows' names.
        rows: cells of two texts each, ours and the printed one.
        note: what a reader must know.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[tuple[str, str], ...], ...]
    note: str


def score_table(evidence: Evidence) -> ReportTable:
    """A table of scores: every printed row, and ours where it is evaluated."""
    plan, model = evidence.plan, evidence.plan.model
    printed = [row for row in published() if row.table == model.number]
    planned = {(row.printed.name, row.printed.budget): str(row.schedule) for row in plan.rows}
    names = list(printed[0].scores)
    rows = []
    for row in printed:
        schedule = planned.get((row.name, row.budget))
        ours = None if evidence.table is None or schedule is None else evidence.table.rows.get(schedule)
        cells = [_name(row, schedule), (_tokens(ours), row.budget.replace("pct", " %") or "all")]
        cells += [_score(model.task(name), ours, row.scores.get(name)) for name in names]
        rows.append(tuple([*cells, (number(None if ours is None else ours.acc), number(row.acc)), _rel(ours, row)]))
    note = "Above: ours, with the 95 % interval of Rel. Below, grey: as printed."
    if model.scaled or model.demo:
        note += (
            f" The printed numbers are of {model.table.title}; {model.name} is another model, with its layers and budgets scaled, so "
            "the two are not compared."
        )
    title = f"{model.name} and the printed Table {model.number}"
    return ReportTable(title, ("row", "tokens", *names, "Acc", "Rel"), tuple(rows), note)


def _name(row: PublishedRow, schedule: str | None) -> tuple[str, str]:
    return f"{row.name} {row.budget.replace('pct', ' %')}".strip(), schedule or "not in this run"


def _tokens(row: TableRow | None) -> str:
    return "" if row is None else number(row.cost.avg_visual_tokens, 0)


def _score(task: str, row: TableRow | None, value: float | None) -> tuple[str, str]:
    cell = None if row is None else row.cells.get(task)
    decimals = digits(task) if task in TASKS else 1
    return number(None if cell is None else cell.score, decimals), number(value, decimals)


def _rel(row: TableRow | None, printed: PublishedRow) -> tuple[str, str]:
    if row is None or row.rel is None:
        return "", number(printed.rel)
    span = row.rel_interval
    text = number(row.rel) + ("" if span is None else f" ({number(100 + span.low)} to {number(100 + span.high)})")
    return text, number(printed.rel)


def cost_table(evidence: Evidence, arithmetic: Mapping[str, Mapping[str, float]]) -> ReportTable:
    """Table 3: costs by arithmetic for the paper's model, and what was timed and scored here.

    Args:
        evidence: of a model.
        arithmetic: what ``lmms-prune schedule`` has printed, by the row's label.
    """
    model, plan = evidence.plan.model, evidence.plan
    output = evidence.output(f"{model.name}-bench") or {}
    runs = {run["schedule"]: run for run in output.get("runs", [])}
    clock = output.get("clock", "")
    task = model.task("TextVQA")
    rows = []
    for cost in plan.costs:
        printed = cost.printed
        by_arithmetic, run = arithmetic.get(printed.label, {}), runs.get(str(cost.schedule))
        cuda = None if run is None else 1e3 * (run["parts"]["selection"] + run["parts"]["prefill"])
        rows.append(
            (
                (printed.label, str(cost.schedule)),
                (number(by_arithmetic.get("tflops"), 2), number(printed.tflops, 2)),
                (number(by_arithmetic.get("kv_mib")), number(printed.mib)),
                (number(cuda), number(printed.cuda_ms)),
                (number(None if run is None else 1e3 * run["seconds"]), number(printed.latency_ms)),
                (
                    "" if run is None else f"{run['realised_speedup']:.2f}x",
                    _printed_speedup(printed, plan.costs[0].printed),
                ),
                (number(_accuracy(evidence, printed, task)), number(printed.acc)),
            )
        )
    columns = ("row", "TFLOPs", "cache MiB", "CUDA ms", "latency ms", "speed-up", "TextVQA")
    note = (
        f"TFLOPs and cache: by arithmetic for {model.table.title}, whatever model was timed. Times and TextVQA: {model.name}, "
        f"{clock or 'not timed'}, speed-up of the whole answer. Below, grey: as printed, on one A6000; neither printed time is defined."
    )
    return ReportTable(f"{model.name} and the printed Table 3", columns, tuple(rows), note)


def _printed_speedup(row: PublishedCost, unpruned: PublishedCost) -> str:
    return f"{unpruned.latency_ms / row.latency_ms:.2f}x"


def _accuracy(evidence: Evidence, printed: PublishedCost, task: str) -> float | None:
    """TextVQA's score of a row's evaluations, mean over the seeds."""
    wanted = {
        str(row.schedule)
        for row in evidence.plan.rows
        if (row.printed.name, row.printed.budget) == (printed.name, printed.budget)
    }
    if evidence.table is None:
        return None
    scores = [
        row.cells[task].score for text, row in evidence.table.rows.items() if text in wanted and task in row.cells
    ]
    return fmean(scores) if scores else None
