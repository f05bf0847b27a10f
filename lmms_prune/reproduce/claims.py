"""What the paper claims in its tables and figures, and whether a run reproduces it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from lmms_prune.information.horizon import LITTLE, Horizon, find_horizon, score_horizons
from lmms_prune.information.plots import KEPT
from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.interval import Interval
from lmms_prune.leaderboard.samples import Samples
from lmms_prune.leaderboard.statistics import interval, resampled
from lmms_prune.record.information import InformationError
from lmms_prune.reproduce.chain import ORACLE
from lmms_prune.reproduce.evidence import RESAMPLES, SEED, Evidence, LayerScores, removed_at, single_stages
from lmms_prune.reproduce.items import GENERAL, READING, Item

State = Literal["reproduced", "not reproduced", "not run"]
REPRODUCED: State = "reproduced"
NOT_REPRODUCED: State = "not reproduced"
NOT_RUN: State = "not run"

MARGIN = 2.0  # percent of the unpruned score; a smaller difference counts as none
ABSTRACT = "abstract of arXiv 2512.07580"
_UNDECIDED = "undecided: the interval is too wide"
_TOO_FEW = "too few documents for an interval: most of its categories have one image"


@dataclass(frozen=True)
class Finding:
    """One claim on one model's run.

    Args:
        claim: what the paper says.
        source: where it says so.
        rule: what is reproduced, in numbers.
        state: the mark.
        where: model, task and keep.
        measured: the numbers that decide, with their interval; why it was not run.
    """

    claim: str
    source: str
    rule: str
    state: State
    where: str
    measured: str


@dataclass(frozen=True)
class PaperClaim:
    """A claim and the rule by which it counts as reproduced."""

    text: str
    source: str
    rule: str

    def finding(self, state: State, where: str, measured: str) -> Finding:
        """The claim on one run."""
        return Finding(self.text, self.source, self.rule, state, where, measured)

    def above(self, least: float, difference: Interval | None, where: str, unit: str, what: str = "") -> Finding:
        """Reproduced if the whole interval lies above `least`."""
        if difference is None:
            return self.finding(NOT_RUN, where, what or "runs are missing")
        state = REPRODUCED if difference.low > least else NOT_REPRODUCED
        undecided = "no difference" if difference.low == difference.high == least else ""
        undecided = _UNDECIDED if difference.low <= least < difference.high else undecided
        return self.finding(state, where, _joined(what, printed(difference, unit), undecided))

    def below(self, most: float, difference: Interval | None, where: str, unit: str, what: str = "") -> Finding:
        """Reproduced if the whole interval lies below `most`."""
        if difference is None:
            return self.finding(NOT_RUN, where, what or "runs are missing")
        state = REPRODUCED if difference.high < most else NOT_REPRODUCED
        undecided = _UNDECIDED if difference.low < most <= difference.high else ""
        return self.finding(state, where, _joined(what, printed(difference, unit), undecided))


def printed(value: Interval, unit: str) -> str:
    """An interval in words."""
    digits = 4 if unit == "probability" else 1
    shown = (f"{number:+.{digits}f}" for number in (value.value, value.low, value.high))
    first, low, high = shown
    return f"{first} {unit} ({low} to {high})"


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


# -- Tables 1 and 2 ----------------------------------------------------------------------------------------------------

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


def table_findings(item: Item, evidence: Evidence) -> Iterator[Finding]:
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


def _same_numbers(evidence: Evidence, name: str) -> Finding:
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
        return _SAME.finding(NOT_RUN, name, _joined(f"{compared} of {wanted} rows can be compared", other))
    state = REPRODUCED if inside == compared else NOT_REPRODUCED
    return _SAME.finding(state, name, f"{inside} of {compared} printed values lie in our intervals")


def _rel_difference(evidence: Evidence, first: str, second: str) -> Interval | None:
    """Rel of one row minus that of another, with a paired interval; None if an evaluation is missing."""
    table = evidence.table
    if table is None or any(text not in table.entries for text in (first, second, "none")):
        return None
    one, other, baseline = (table.entries[text] for text in (first, second, "none"))
    tasks = baseline.tasks
    drawn = [table.draws.ratio(entry, baseline, tasks) for entry in (one, other)]
    rels = [table.rows[text].rel for text in (first, second)]
    if drawn[0] is None or drawn[1] is None or rels[0] is None or rels[1] is None:
        return None
    return interval(rels[0] - rels[1], drawn[0] - drawn[1])


def _best_row(evidence: Evidence, singles: Mapping[tuple[str, str], str], name: str) -> Finding:
    best = next(text for (row, _), text in singles.items() if row == "DivPrune+Random")
    table = evidence.table
    others = [text for (row, _), text in singles.items() if text not in (best, "none")]
    if table is None or any(text not in table.rows or table.rows[text].rel is None for text in (best, *others)):
        return _BEST.finding(NOT_RUN, name, "runs are missing")
    second = max(others, key=lambda text: table.rows[text].rel or 0.0)
    return _BEST.above(0.0, _rel_difference(evidence, best, second), name, "points of Rel", f"against {second}")


# -- Table 3 -----------------------------------------------------------------------------------------------------------

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


def cost_findings(evidence: Evidence, arithmetic: Mapping[str, Mapping[str, float]]) -> Iterator[Finding]:
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
        ours, theirs = (
            f"{f:.2f} TFLOPs, {m:.1f} MiB"
            for f, m in ((row["tflops"], row["kv_mib"]), (printed_cost.tflops, printed_cost.mib))
        )
        yield _ARITHMETIC.finding(REPRODUCED if equal else NOT_REPRODUCED, where, f"{ours}; printed {theirs}")
    yield from _faster(evidence)


def _faster(evidence: Evidence) -> Iterator[Finding]:
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
        one, other = runs[hybrid], runs[schedule]
        state = REPRODUCED if one["realised_low"] > other["realised_high"] else NOT_REPRODUCED
        spans = [
            f"{r['realised_speedup']:.2f}x ({r['realised_low']:.2f} to {r['realised_high']:.2f})" for r in (one, other)
        ]
        overlap = one["realised_high"] >= other["realised_low"] and state == NOT_REPRODUCED
        yield _FASTER.finding(state, where, _joined(f"{spans[0]} against {spans[1]}", _UNDECIDED if overlap else ""))


# -- Figures 1, 2 and 10 -----------------------------------------------------------------------------------------------

_NO_BETTER = PaperClaim(
    "In deep layers the methods are no better than random pruning.",
    ABSTRACT,
    f"For every method the 95 % interval of its score minus random's, mean over the deep layers, lies below {MARGIN:g} % of the "
    "unpruned score.",
)
_BETTER_EARLY = PaperClaim(
    "Before, choosing matters: in shallow layers a method is better than random pruning.",
    f"{ABSTRACT}: there, tokens still differ in information",
    "For at least one method that interval, over the first third of the layers, lies above 0.",
)


def method_findings(item: Item, evidence: Evidence) -> Iterator[Finding]:
    """The claims of the figures of methods as the only stage."""
    plan = evidence.plan
    for task in plan.item_tasks(item):
        for keep in plan.item_keeps(item):
            where = f"{plan.model.name}, {column(task)}, {keep} kept"
            if not has_interval(evidence.layers.get(task, {})):
                yield from (claim.finding(NOT_RUN, where, _TOO_FEW) for claim in (_NO_BETTER, _BETTER_EARLY))
                continue
            differences = _against(
                evidence.layers.get(task, {}), keep, "random", plan.model.deep, plan.model.sizes.layers
            )
            yield _worst(_NO_BETTER, differences, where)
            early = _against(evidence.layers.get(task, {}), keep, "random", 0, plan.model.shallow)
            yield _best(_BETTER_EARLY, early, where, "% of the unpruned score")


def has_interval(scores: LayerScores) -> bool:
    """Whether resampling within strata can move a score: a stratum of one unit (an image of MME) always gives the same."""
    if "none" not in scores:
        return True
    sizes = np.bincount(scores["none"].stratum)
    return bool(sizes[sizes > 1].sum() >= sizes.sum() / 2)


def column(task: str) -> str:
    """A task's benchmark."""
    return TASKS[task].name if task in TASKS else task


def _against(scores: LayerScores, keep: str, control: str, first: int, last: int) -> dict[str, Interval]:
    """Each method's score minus the control's, mean over some layers, in percent of the unpruned score."""
    methods = single_stages(scores, keep) if scores else {}
    reference = methods.pop(control, {})
    differences = {}
    for method, by_layer in methods.items():
        layers = [n for n in range(first, last) if n in by_layer]
        complete = [n for n in layers if n in reference]
        if not complete or len(complete) < len(layers) or len(layers) < last - max(first, 1):
            continue
        differences[method] = _mean_difference(
            scores["none"], [by_layer[n] for n in layers], [reference[n] for n in layers]
        )
    return differences


def _mean_difference(unpruned: Samples, runs: Sequence[Samples], controls: Sequence[Samples]) -> Interval:
    """Mean score of some runs minus that of others, in percent of the unpruned score, on the same resamples."""
    drawn = resampled([unpruned, *runs, *controls], RESAMPLES, np.random.default_rng(SEED))
    count, full = len(runs), unpruned.score or 1.0
    values = np.mean([run.score for run in runs]) - np.mean([run.score for run in controls])
    draws = drawn[:, 1 : 1 + count].mean(1) - drawn[:, 1 + count :].mean(1)
    return interval(100 * float(values) / full, 100 * draws / full)


def _worst(claim: PaperClaim, differences: Mapping[str, Interval], where: str) -> Finding:
    """A claim that must hold for every method, by the one with the highest interval."""
    if not differences:
        return claim.finding(NOT_RUN, where, "runs are missing")
    method = max(differences, key=lambda name: differences[name].high)
    return claim.below(MARGIN, differences[method], where, "% of the unpruned score", f"highest: {method}")


def _best(claim: PaperClaim, differences: Mapping[str, Interval], where: str, unit: str) -> Finding:
    """A claim that must hold for one method, by the one with the highest lower end."""
    if not differences:
        return claim.finding(NOT_RUN, where, "runs are missing")
    method = max(differences, key=lambda name: differences[name].low)
    return claim.above(0.0, differences[method], where, unit, f"highest: {method}")


# -- Figures 5 and 12 --------------------------------------------------------------------------------------------------

_KEEPS_NO_MORE = PaperClaim(
    "In deep layers the methods keep no more information than random pruning.",
    ABSTRACT,
    f"For every method, what it keeps minus what as many average tokens have lies below {LITTLE:g} a kept token, mean over the "
    "deep layers and documents.",
)
_KEEPS_MORE = PaperClaim(
    "In shallow layers a method keeps more information than random pruning.",
    f"{ABSTRACT}: there, tokens still differ in information",
    "For at least one method that difference, over the first third of the layers, lies above 0.",
)


def kept_findings(item: Item, evidence: Evidence) -> Iterator[Finding]:
    """The claims of the figures of kept information."""
    plan, model = evidence.plan, evidence.plan.model
    for task in plan.item_tasks(item):
        for keep in plan.item_keeps(item):
            where = f"{model.name}, {column(task)}, {keep} kept"
            deep = _kept_differences(evidence.kept, task, keep, model.deep, model.sizes.layers)
            if not deep:
                yield _KEEPS_NO_MORE.finding(NOT_RUN, where, "nothing is measured")
                yield _KEEPS_MORE.finding(NOT_RUN, where, "nothing is measured")
                continue
            highest = max(deep, key=lambda name: deep[name].high)
            yield _KEEPS_NO_MORE.below(LITTLE, deep[highest], where, "probability", f"highest: {highest}")
            early = _kept_differences(evidence.kept, task, keep, 0, model.shallow)
            yield _best(_KEEPS_MORE, early, where, "probability")


def _kept_differences(kept: pd.DataFrame | None, task: str, keep: str, first: int, last: int) -> dict[str, Interval]:
    """Each method's kept information minus that of as many average tokens, a kept token, with an interval over documents."""
    if kept is None:
        return {}
    same_keep = kept["keep"] == (keep if keep.endswith("t") else str(float(keep)))
    lines = kept[(kept.task == task) & same_keep & kept.layer.between(first, last - 1)]
    values = lines.assign(a_token=lines.information / lines.kept.clip(lower=1))
    table = values.pivot_table(index="sample", columns=["method", "layer"], values="a_token")
    differences = {}
    for method in lines.method.unique():
        if method in KEPT:
            continue
        layers = [n for n in table[method].columns if n in table["mean"].columns]
        differences[method] = over_documents((table[method][layers] - table["mean"][layers]).mean(axis=1).to_numpy())
    return differences


def over_documents(values: np.ndarray) -> Interval:
    """The mean of one number a document, with its bootstrap interval."""
    rng = np.random.default_rng(SEED)
    drawn = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    return interval(float(values.mean()), drawn)


# -- Figures 6 and 11 --------------------------------------------------------------------------------------------------

_MEASURES = PaperClaim(
    "Information says which tokens matter: keeping those of the highest information scores more than random pruning.",
    'README of the authors\' code, Figure 6: "Prune with Token Information"',
    "The 95 % interval of the difference, mean over the layers before the deep ones, lies above 0.",
)
_NO_GAIN = PaperClaim(
    "In deep layers even the tokens of the highest information are no better than random ones.",
    f"{ABSTRACT}: information vanishes, and visual tokens become redundant",
    f"The 95 % interval of the difference over the deep layers lies below {MARGIN:g} % of the unpruned score.",
)


def oracle_findings(item: Item, evidence: Evidence) -> Iterator[Finding]:
    """The claims of the figures of pruning by information."""
    plan, model = evidence.plan, evidence.plan.model
    for task in plan.item_tasks(item):
        for keep in plan.item_keeps(item):
            where = f"{model.name}, {column(task)}, {keep} kept"
            scores = evidence.oracle.get(task, {})
            if not has_interval(scores):
                yield from (claim.finding(NOT_RUN, where, _TOO_FEW) for claim in (_MEASURES, _NO_GAIN))
                continue
            early = _against(scores, keep, "random", 0, model.deep).get(ORACLE)
            yield _MEASURES.above(0.0, early, where, "% of the unpruned score")
            late = _against(scores, keep, "random", model.deep, model.sizes.layers).get(ORACLE)
            yield _NO_GAIN.below(MARGIN, late, where, "% of the unpruned score")


# -- Figures 7, 8 and 9 ------------------------------------------------------------------------------------------------

_UNIFORM = PaperClaim(
    "As layers deepen, information becomes uniform over the tokens.",
    ABSTRACT,
    "Variance over tokens in the deep layers is less than half of that in the first third: the 95 % interval of the ratio lies "
    "below 0.5.",
)
_VANISHES = PaperClaim(
    "Information vanishes at an intermediate layer, the horizon; beyond it visual tokens are redundant.",
    ABSTRACT,
    "The 95 % interval of the horizon ends before the last layer: from it on, removing all visual tokens costs at most 1 % of the "
    f"score, and mean information is below {LITTLE:g}.",
)
_DEEPER = PaperClaim(
    "The horizon lies deeper for tasks that read text than for general ones.",
    ABSTRACT,
    "Mean horizon of the reading benchmarks minus that of the others, by scores: the 95 % interval lies above 0.",
)
_STRONGER = PaperClaim(
    "The stronger model uses visual tokens in deeper layers than the weaker one.",
    ABSTRACT,
    "Horizon as a share of the depth, mean over the shared benchmarks, stronger minus weaker: the 95 % interval lies above 0.",
)


def variance_findings(item: Item, evidence: Evidence) -> Iterator[Finding]:
    """The claim of the figure of variances."""
    plan, model, table = evidence.plan, evidence.plan.model, evidence.information
    for task in plan.item_tasks(item):
        where = f"{model.name}, {column(task)}"
        lines = None if table is None else table[table.task == task]
        if lines is None or not len(lines):
            yield _UNIFORM.finding(NOT_RUN, where, "nothing is measured")
            continue
        wide = lines.pivot_table(index="sample", columns="layer", values="variance")
        early, late = (
            wide[[n for n in wide.columns if first <= n < last]].mean(axis=1).to_numpy()
            for first, last in ((0, model.shallow), (model.deep, model.sizes.layers))
        )
        rng = np.random.default_rng(SEED)
        picks = rng.integers(0, len(early), (RESAMPLES, len(early)))
        ratio = interval(late.mean() / early.mean(), late[picks].mean(1) / early[picks].mean(1))
        text = f"{ratio.value:.3f} of the variance of the first third ({ratio.low:.3f} to {ratio.high:.3f})"
        yield _UNIFORM.finding(REPRODUCED if ratio.high < 0.5 else NOT_REPRODUCED, where, text)


def vanishing_findings(item: Item, evidence: Evidence) -> Iterator[Finding]:
    """The claim of the figure of mean information and scores."""
    plan, depth = evidence.plan, evidence.plan.model.sizes.layers
    for task in plan.item_tasks(item):
        where = f"{plan.model.name}, {column(task)}"
        horizon = horizon_of(evidence, task)
        if horizon is None or not has_interval(evidence.layers[task]):
            reason = "runs are missing" if horizon is None else f"layer {horizon.layer} of {depth}; {_TOO_FEW}"
            yield _VANISHES.finding(NOT_RUN, where, reason)
            continue
        state = REPRODUCED if horizon.high < depth else NOT_REPRODUCED
        undecided = _UNDECIDED if horizon.layer < depth <= horizon.high else ""
        text = f"layer {horizon.layer} of {depth} ({horizon.low} to {horizon.high})"
        yield _VANISHES.finding(state, where, _joined(text, undecided))


def horizon_of(evidence: Evidence, task: str) -> Horizon | None:
    """A task's horizon, from scores and, as far as it is measured, information; None if a layer is missing."""
    scores = evidence.layers.get(task)
    removed = None if scores is None else removed_at(scores, evidence.plan.model.sizes.layers)
    if scores is None or removed is None:
        return None
    table = evidence.information
    lines = None if table is None else table[table.task == task]
    lines = None if lines is None or not len(lines) else lines
    try:
        return find_horizon(task, lines, scores["none"], removed, resamples=RESAMPLES, partial=True)
    except InformationError:  # measured on other documents than these
        return find_horizon(task, None, scores["none"], removed, resamples=RESAMPLES)


def horizon_findings(item: Item, evidence: Evidence) -> Iterator[Finding]:
    """The claims of the figure of horizons, of one model."""
    plan, model = evidence.plan, evidence.plan.model
    tasks = plan.item_tasks(item)
    names = [[task for task in tasks if task in model.tasks(group)] for group in (GENERAL, READING)]
    drawn = [{task: draws for task in group if (draws := _drawn(evidence, task)) is not None} for group in names]
    if not all(names) or any(len(own) < len(group) for own, group in zip(drawn, names, strict=True)):
        known = sum(map(len, drawn))
        yield _DEEPER.finding(NOT_RUN, model.name, f"horizons of {known} of {len(tasks)} benchmarks are known")
        return
    general, reading = (
        (np.mean([own for own, _ in group.values()]), np.mean([draws for _, draws in group.values()], axis=0))
        for group in drawn
    )
    difference = interval(float(reading[0] - general[0]), reading[1] - general[1])
    certain = [column(task) for task in tasks if not has_interval(evidence.layers[task])]
    note = f"{', '.join(certain)} without an interval: {_TOO_FEW.partition(': ')[2]}" if certain else ""
    text = _joined(note, f"{reading[0]:.1f} against {general[0]:.1f}")
    yield _DEEPER.above(0.0, difference, model.name, "layers", text)


def _drawn(evidence: Evidence, task: str) -> tuple[int, np.ndarray] | None:
    scores = evidence.layers.get(task)
    removed = None if scores is None else removed_at(scores, evidence.plan.model.sizes.layers)
    return None if scores is None or removed is None else score_horizons(scores["none"], removed, resamples=RESAMPLES)


def stronger_finding(item: Item, studied: Sequence[Evidence]) -> Finding:
    """The claim of the figure of horizons that compares the paper's two models."""
    by_table = {evidence.plan.model.number: evidence for evidence in studied}
    strong, weak = by_table.get(1), by_table.get(2)
    where = "both models"
    if strong is None or weak is None:
        return _STRONGER.finding(NOT_RUN, where, "it needs both of the paper's models")
    if strong.plan.model.scaled or weak.plan.model.scaled:
        return _STRONGER.finding(NOT_RUN, where, "these models do not differ in capacity as the paper's do")
    values, draws = [], []
    for task, other in zip(strong.plan.item_tasks(item), weak.plan.item_tasks(item), strict=True):
        pair = _drawn(strong, task), _drawn(weak, other)
        if pair[0] is None or pair[1] is None:
            return _STRONGER.finding(NOT_RUN, where, "runs are missing")
        depths = [evidence.plan.model.sizes.layers for evidence in (strong, weak)]
        values.append(100 * (pair[0][0] / depths[0] - pair[1][0] / depths[1]))
        draws.append(100 * (pair[0][1] / depths[0] - pair[1][1] / depths[1]))
    return _STRONGER.above(0.0, interval(float(np.mean(values)), np.mean(draws, axis=0)), where, "% of the depth")


BY_KIND: Mapping[str, Callable[[Item, Evidence], Iterator[Finding]]] = {
    "scores": table_findings,
    "methods": method_findings,
    "kept": kept_findings,
    "oracle": oracle_findings,
    "variance": variance_findings,
    "vanishing": vanishing_findings,
    "horizons": horizon_findings,
}
