"""The claims of the figures of scores by layer: methods as the only stage, and pruning by information."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.interval import Interval
from lmms_prune.leaderboard.samples import Samples
from lmms_prune.leaderboard.statistics import interval, resampled
from lmms_prune.reproduce.chain import CONTROL, ORACLE
from lmms_prune.reproduce.evidence import RESAMPLES, SEED, Evidence, LayerScores, single_stages
from lmms_prune.reproduce.items import Item
from lmms_prune.reproduce.marks import ABSTRACT, MARGIN, NOT_RUN, TOO_FEW, PaperClaim, Verdict

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


def method_findings(item: Item, evidence: Evidence) -> Iterator[Verdict]:
    """The claims of the figures of methods as the only stage."""
    plan = evidence.plan
    layers = plan.model.sizes.layers
    for task in plan.item_tasks(item):
        for keep in plan.item_keeps(item):
            where = f"{plan.model.name}, {column(task)}, {keep} kept"
            scores = evidence.layers.get(task, {})
            if not has_interval(scores):
                yield from (claim.finding(NOT_RUN, where, TOO_FEW) for claim in (_NO_BETTER, _BETTER_EARLY))
                continue
            yield _worst(_NO_BETTER, _against_random(scores, keep, plan.methods, plan.model.deep, layers), where)
            early = _against_random(scores, keep, plan.methods, 0, plan.model.shallow)
            yield best_of(_BETTER_EARLY, early, where, "% of the unpruned score")


def has_interval(scores: LayerScores) -> bool:
    """Whether resampling within strata can move a score: a stratum of one unit (an image of MME) always gives the same."""
    if "none" not in scores:
        return True
    sizes = np.bincount(scores["none"].stratum)
    return bool(sizes[sizes > 1].sum() >= sizes.sum() / 2)


def column(task: str) -> str:
    """A task's benchmark."""
    return TASKS[task].name if task in TASKS else task


def _against_random(
    scores: LayerScores, keep: str, methods: Sequence[str], first: int, last: int
) -> dict[str, Interval]:
    """Each method's score minus that of random, mean over some layers, in percent of the unpruned score."""
    by_method = single_stages(scores, keep, methods)
    reference = by_method.pop(CONTROL, {})
    differences = {}
    for method, by_layer in by_method.items():
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


def _worst(claim: PaperClaim, differences: Mapping[str, Interval], where: str) -> Verdict:
    """A claim that must hold for every method, by the one with the highest interval."""
    if not differences:
        return claim.finding(NOT_RUN, where, "runs are missing")
    method = max(differences, key=lambda name: differences[name].high)
    return claim.below(MARGIN, differences[method], where, "% of the unpruned score", f"highest: {method}")


def best_of(claim: PaperClaim, differences: Mapping[str, Interval], where: str, unit: str) -> Verdict:
    """A claim that must hold for one method, by the one with the highest lower end."""
    if not differences:
        return claim.finding(NOT_RUN, where, "runs are missing")
    method = max(differences, key=lambda name: differences[name].low)
    return claim.above(0.0, differences[method], where, unit, f"highest: {method}")


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


def oracle_findings(item: Item, evidence: Evidence) -> Iterator[Verdict]:
    """The claims of the figures of pruning by information."""
    plan, model = evidence.plan, evidence.plan.model
    for task in plan.item_tasks(item):
        for keep in plan.item_keeps(item):
            where = f"{model.name}, {column(task)}, {keep} kept"
            scores = evidence.oracle.get(task, {})
            if not has_interval(scores):
                yield from (claim.finding(NOT_RUN, where, TOO_FEW) for claim in (_MEASURES, _NO_GAIN))
                continue
            early = _against_random(scores, keep, (ORACLE, CONTROL), 0, model.deep).get(ORACLE)
            yield _MEASURES.above(0.0, early, where, "% of the unpruned score")
            late = _against_random(scores, keep, (ORACLE, CONTROL), model.deep, model.sizes.layers).get(ORACLE)
            yield _NO_GAIN.below(MARGIN, late, where, "% of the unpruned score")
