"""The claims of Tables 1 to 3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lmms_prune.leaderboard.interval import Interval
from lmms_prune.leaderboard.statistics import interval
from lmms_prune.reproduce.evidence import Evidence
from lmms_prune.reproduce.items import Item
from lmms_prune.reproduce.marks import (
    ABSTRACT,
    NOT_REPRODUCED,
    NOT_RUN,
    REPRODUCED,
    UNDECIDED,
    PaperClaim,
    Verdict,
    joined,
)

_SAME = PaperClaim(
    "Rel of every row is the printed one.",
    "the table",
    "The printed Rel lies in the 95 % interval of ours; same protocol.",
)
_ADDS = PaperClaim(
    "Random pruning in the deep layers improves the method: +Random scores more than the method alone at the same budget.",
    ABSTRACT,
    "The 95 % interval of the difference of Rel lies above 0.",
)
_BEST = PaperClaim(
    "DivPrune+Random is the best row.", f"{ABSTRACT}; Table 1", "Its Rel minus that of the next best row lies above 0."
)


def table_findings(item: Item, evidence: Evidence) -> Iterator[Verdict]:
    """The claims of a table of scores."""
    plan, table = evidence.plan, evidence.table
    name = plan.model.name
    yield _same_numbers(evidence, name)
    singles = {(row.printed.name, row.printed.budget): str(row.schedule) for row in plan.rows if not row.seed}
    for (row, budget), schedule in singles.items():
        hybrid = singles.get((f"{row}+Random", budget))
        if hybrid is None:
            continue
        what = f"{hybrid} against {schedule}"
        difference = None if table is None else _rel_difference(evidence, hybrid, schedule)
        yield _ADDS.above(0.0, difference, f"{name}, {row}, {_budget(budget)}", "points of Rel", what)
    if plan.model.number == 1:
        yield _best_row(evidence, singles, name)


def _budget(text: str) -> str:
    return "half of the tokens" if text == "50pct" else f"{text} tokens" if text else ""


def _same_numbers(evidence: Evidence, name: str) -> Verdict:
    plan, table = evidence.plan, evidence.table
    if plan.model.scaled or plan.model.demo:
        return _SAME.finding(NOT_RUN, name, f"the printed numbers are of {plan.model.table.title}, not of this model")
    compared, inside, other = 0, 0, ""
    for row in [] if table is None else table.rows.values():
        if row.published is None or row.rel is None:
            continue
        if row.unlike:
            other = other or f"another protocol: {row.unlike[0]}"
            continue
        compared += 1
        low, high = (0.0, 0.0) if row.rel_interval is None else (row.rel_interval.low, row.rel_interval.high)
        inside += 100 + low - 0.05 <= row.published.rel <= 100 + high + 0.05
    wanted = len({(row.printed.name, row.printed.budget) for row in plan.rows})
    if compared < wanted:
        return _SAME.finding(NOT_RUN, name, joined(f"{compared} of {wanted} rows can be compared", other))
    state = REPRODUCED if inside == compared else NOT_REPRODUCED
    return _SAME.finding(state, name, f"{inside} of {compared} printed values lie in our intervals")


def _rel_difference(evidence: Evidence, first: str, second: str) -> Interval | None:
    """Rel of one row minus that of another, with a paired interval; None if an evaluation is missing."""
    table = evidence.table
    if table is None or any(text not in table.entries for text in (first, second, "none")):
        return None
    baseline = table.entries["none"]
    drawn = [table.draws.ratio(table.entries[text], baseline, baseline.tasks) for text in (first, second)]
    rels = [table.rows[text].rel for text in (first, second)]
    if drawn[0] is None or drawn[1] is None or rels[0] is None or rels[1] is None:
        return None
    return interval(rels[0] - rels[1], drawn[0] - drawn[1])


def _best_row(evidence: Evidence, singles: Mapping[tuple[str, str], str], name: str) -> Verdict:
    best = next(text for (row, _), text in singles.items() if row == "DivPrune+Random")
    table = evidence.table
    others = [text for (row, _), text in singles.items() if text not in (best, "none")]
    if table is None or any(text not in table.rows or table.rows[text].rel is None for text in (best, *others)):
        return _BEST.finding(NOT_RUN, name, "runs are missing")
    second = max(others, key=lambda text: table.rows[text].rel or 0.0)
    return _BEST.above(0.0, _rel_difference(evidence, best, second), name, "points of Rel", f"against {second}")


_ARITHMETIC = PaperClaim(
    "FLOPs and cache are the printed ones.",
    "Table 3",
    "By arithmetic, for the paper's model: FLOPs within 0.01 TFLOPs and cache within 0.1 MiB, the last printed digits. No "
    "interval: nothing is random.",
)
_FASTER = PaperClaim(
    "DART+Random takes less time than DART alone at the same budget.",
    "Table 3: CUDA time and latency of every +Random row are below those of its method",
    "The 95 % interval of our speed-up lies above that of the method alone, of the whole answer.",
)


def cost_findings(evidence: Evidence, arithmetic: Mapping[str, Mapping[str, float]]) -> Iterator[Verdict]:
    """The claims of Table 3.

    Args:
        evidence: of a model.
        arithmetic: what ``lmms-prune schedule`` has printed, by the row's label.
    """
    for cost in evidence.plan.costs:
        printed_cost, row = cost.printed, arithmetic.get(cost.printed.label)
        where = f"{evidence.plan.model.table.title}, {printed_cost.label}"
        if row is None:
            yield _ARITHMETIC.finding(NOT_RUN, where, "not computed")
            continue
        equal = abs(row["tflops"] - printed_cost.tflops) <= 0.01 and abs(row["kv_mib"] - printed_cost.mib) <= 0.1
        computed, printed = (
            f"{f:.2f} TFLOPs, {m:.1f} MiB"
            for f, m in ((row["tflops"], row["kv_mib"]), (printed_cost.tflops, printed_cost.mib))
        )
        yield _ARITHMETIC.finding(REPRODUCED if equal else NOT_REPRODUCED, where, f"{computed}; printed {printed}")
    yield from _faster(evidence)


def _faster(evidence: Evidence) -> Iterator[Verdict]:
    output, name = evidence.output(f"{evidence.plan.model.name}-bench"), evidence.plan.model.name
    runs = {run["schedule"]: run for run in (output or {}).get("runs", [])}
    by_row = {(cost.printed.name, cost.printed.budget): str(cost.schedule) for cost in evidence.plan.costs}
    for (row, budget), schedule in by_row.items():
        hybrid = by_row.get((f"{row}+Random", budget))
        if hybrid is None:
            continue
        where = f"{name}, {row}, {_budget(budget)}"
        if hybrid not in runs or schedule not in runs:
            yield _FASTER.finding(NOT_RUN, where, "no times")
            continue
        mixed, alone = runs[hybrid], runs[schedule]
        state = REPRODUCED if mixed["realised_low"] > alone["realised_high"] else NOT_REPRODUCED
        spans = [
            f"{r['realised_speedup']:.2f}x ({r['realised_low']:.2f} to {r['realised_high']:.2f})"
            for r in (mixed, alone)
        ]
        overlap = mixed["realised_high"] >= alone["realised_low"] and state == NOT_REPRODUCED
        yield _FASTER.finding(state, where, joined(f"{spans[0]} against {spans[1]}", UNDECIDED if overlap else ""))
