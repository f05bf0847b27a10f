"""The claims of the figures of information: what methods keep of it, its variance, and the horizon."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from lmms_prune.information.horizon import LITTLE, Horizon, find_horizon, score_horizons
from lmms_prune.information.plots import REFERENCES
from lmms_prune.leaderboard.interval import Interval
from lmms_prune.leaderboard.statistics import interval
from lmms_prune.record.information import InformationError
from lmms_prune.reproduce.chain import CONTROL
from lmms_prune.reproduce.evidence import RESAMPLES, SEED, Evidence, removed_at
from lmms_prune.reproduce.items import GENERAL, READING, Item
from lmms_prune.reproduce.layer_claims import best_of, column, has_interval
from lmms_prune.reproduce.marks import (
    ABSTRACT,
    NOT_REPRODUCED,
    NOT_RUN,
    REPRODUCED,
    TOO_FEW,
    UNDECIDED,
    PaperClaim,
    Verdict,
    joined,
)

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


def kept_findings(item: Item, evidence: Evidence) -> Iterator[Verdict]:
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
            yield best_of(_KEEPS_MORE, early, where, "probability")


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
        if method in REFERENCES or method == CONTROL:
            continue
        layers = [n for n in table[method].columns if n in table["mean"].columns]
        differences[method] = over_documents((table[method][layers] - table["mean"][layers]).mean(axis=1).to_numpy())
    return differences


def over_documents(values: np.ndarray) -> Interval:
    """The mean of one number a document, with its bootstrap interval."""
    rng = np.random.default_rng(SEED)
    drawn = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    return interval(float(values.mean()), drawn)


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


def variance_findings(item: Item, evidence: Evidence) -> Iterator[Verdict]:
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
        undecided = UNDECIDED if ratio.low < 0.5 <= ratio.high else ""
        state = REPRODUCED if ratio.high < 0.5 else NOT_REPRODUCED
        yield _UNIFORM.finding(state, where, joined(text, undecided))


def vanishing_findings(item: Item, evidence: Evidence) -> Iterator[Verdict]:
    """The claim of the figure of mean information and scores."""
    plan, depth = evidence.plan, evidence.plan.model.sizes.layers
    for task in plan.item_tasks(item):
        where = f"{plan.model.name}, {column(task)}"
        horizon = horizon_of(evidence, task)
        if horizon is None or not has_interval(evidence.layers[task]):
            reason = "runs are missing" if horizon is None else f"layer {horizon.layer} of {depth}; {TOO_FEW}"
            yield _VANISHES.finding(NOT_RUN, where, reason)
            continue
        state = REPRODUCED if horizon.high < depth else NOT_REPRODUCED
        undecided = UNDECIDED if horizon.layer < depth <= horizon.high else ""
        text = f"layer {horizon.layer} of {depth} ({horizon.low} to {horizon.high})"
        yield _VANISHES.finding(state, where, joined(text, undecided))


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


def horizon_findings(item: Item, evidence: Evidence) -> Iterator[Verdict]:
    """The claims of the figure of horizons, of one model."""
    plan, model = evidence.plan, evidence.plan.model
    tasks = plan.item_tasks(item)
    names = [[task for task in tasks if task in model.tasks(group)] for group in (GENERAL, READING)]
    drawn = [{task: draws for task in group if (draws := _drawn(evidence, task)) is not None} for group in names]
    if not all(names) or any(len(own) < len(group) for own, group in zip(drawn, names, strict=True)):
        known = sum(map(len, drawn))
        yield _DEEPER.finding(NOT_RUN, model.name, f"horizons of {known} of {len(tasks)} benchmarks are known")
        return
    if not all(any(has_interval(evidence.layers[task]) for task in group) for group in names):
        yield _DEEPER.finding(NOT_RUN, model.name, TOO_FEW)
        return
    general, reading = (
        (np.mean([own for own, _ in group.values()]), np.mean([draws for _, draws in group.values()], axis=0))
        for group in drawn
    )
    difference = interval(float(reading[0] - general[0]), reading[1] - general[1])
    certain = [column(task) for task in tasks if not has_interval(evidence.layers[task])]
    note = f"{', '.join(certain)} without an interval: {TOO_FEW.partition(': ')[2]}" if certain else ""
    text = joined(note, f"{reading[0]:.1f} against {general[0]:.1f}")
    yield _DEEPER.above(0.0, difference, model.name, "layers", text)


def _drawn(evidence: Evidence, task: str) -> tuple[int, np.ndarray] | None:
    scores = evidence.layers.get(task)
    removed = None if scores is None else removed_at(scores, evidence.plan.model.sizes.layers)
    return None if scores is None or removed is None else score_horizons(scores["none"], removed, resamples=RESAMPLES)


def stronger_finding(item: Item, studied: Sequence[Evidence]) -> Verdict:
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
