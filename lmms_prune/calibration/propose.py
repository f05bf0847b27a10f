"""Finds the hybrid schedule that loses least at a budget: chosen on some documents, verified on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmms_prune.errors import ScheduleError
from lmms_prune.information.horizon import EPSILON
from lmms_prune.information.layer_sweep import Evaluation, Report, acts_at, evaluate
from lmms_prune.leaderboard.samples import Samples
from lmms_prune.leaderboard.statistics import CONFIDENCE, mean_ratio, resampled
from lmms_prune.record.information import InformationError
from lmms_prune.schedule import Budget, PromptSizes, Schedule

DEEP = (0.0, 0.05, 0.15)  # keep ratios from the horizon on
TRIED = 8  # layers at which removal is tried


@dataclass(frozen=True)
class Loss:
    """The relative loss of the unpruned scores, in percent: the mean over tasks, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Proposal:
    """The schedule that lost least.

    Args:
        schedule: with every ``?`` solved.
        horizon: the layer from which removing all visual tokens costs next to nothing.
        chosen: its loss on the documents that it was chosen on; biased downwards by the choice.
        verified: its loss on other documents; an unbiased estimate.
        tried: each candidate and its loss, the best first.
        compared: schedules given for comparison, with their loss on the same documents as `verified`.
    """

    schedule: str
    horizon: int
    chosen: Loss
    verified: Loss
    tried: Mapping[str, Loss]
    compared: Mapping[str, Loss]


def candidates(methods: Sequence[str], horizons: Sequence[int], budget: Budget | str, sizes: PromptSizes) -> list[str]:
    """Hybrids that meet a budget, with their ``?`` solved.

    A method prunes early (at the first layers it can, and at an eighth of the depth). From a horizon on, random tokens are
    kept, or none. If the budget is larger than all of these need, the candidates keep all tokens until a horizon, or have
    one method as the only stage.

    Args:
        methods: the methods that prune early.
        horizons: possible layers of the deep stage; layers at or beyond the depth give no deep stage.
        budget, sizes: as for `Schedule.solve`.

    Raises:
        InformationError: no candidate can meet the budget.
    """
    depth = sizes.layers
    early = [
        (method, layer)
        for method in methods
        for layer in dict.fromkeys(n for n in (0, 1, max(1, depth // 8)) if acts_at(method, n))
    ]
    hybrids = []
    for method, layer in early:
        late = [
            f",vtw@{horizon}" if deep == 0 else f",random@{horizon}:{deep:g}"
            for horizon in horizons
            if layer < horizon < depth
            for deep in DEEP
        ]
        hybrids += [f"{method}@{layer}:?{rest}" for rest in late or [""]]
    ample = [f"random@{horizon}:?" for horizon in horizons if 0 < horizon < depth]
    ample += [f"{method}@{layer}:?" for method, layer in early]
    solved, problem = _solved(hybrids, budget, sizes)
    if not solved:
        solved, _ = _solved(ample, budget, sizes)
    if not solved:
        raise InformationError(f"--budget {budget}: no candidate meets it. The last one: {problem}")
    return solved


def _solved(texts: Sequence[str], budget: Budget | str, sizes: PromptSizes) -> tuple[list[str], str]:
    """The schedules that can meet a budget, without duplicates, and why the last of the others cannot."""
    solved: dict[str, None] = {}
    problem = ""
    for text in texts:
        try:
            solved[str(Schedule.parse(text).solve(budget, sizes))] = None
        except ScheduleError as error:
            problem = str(error)
    return list(solved), problem


def removal_horizon(evaluation: Evaluation, first: int, depth: int, out: Path, launch: str, report: Report) -> int:
    """The layer from which on removing all visual tokens loses at most EPSILON.

    Tries TRIED layers from `first` to the last. If even the deepest of them loses more, returns the depth.
    """
    layers = sorted({round(float(n)) for n in np.linspace(first, depth - 1, TRIED)}) if first < depth else []
    if not layers:
        return depth
    scores = evaluate(evaluation, ["none", *(f"vtw@{n}" for n in layers)], out, launch, report)
    horizon = depth
    for layer in reversed(layers):
        if loss(scores["none"], scores[f"vtw@{layer}"], 100, 0).value > 100 * EPSILON:
            break
        horizon = layer
    return horizon


def propose(
    evaluation: Evaluation,
    others: Evaluation,
    texts: Sequence[str],
    horizon: int,
    out: Path,
    launch: str,
    report: Report,
    compared: Sequence[str] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> Proposal:
    """Evaluate candidates on some documents of each task, and the best one on others.

    Args:
        evaluation: the model and the documents to choose on.
        others: the same model with the documents to verify on.
        texts: the schedules to try, from `candidates`.
        horizon: from `removal_horizon`; only recorded.
        out: folder of the runs; complete ones are reused.
        launch, report: as for `evaluate`.
        compared: further schedules to evaluate on the other documents.
        resamples, seed: number of bootstrap resamples, and their seed.
    """
    scores = evaluate(evaluation, ["none", *texts], out / "chosen", launch, report)
    tried = {text: loss(scores["none"], scores[text], resamples, seed) for text in texts}
    tried = dict(sorted(tried.items(), key=lambda item: item[1].value))
    best = next(iter(tried))
    verifying = evaluate(others, list(dict.fromkeys(["none", best, *compared])), out / "verified", launch, report)
    verified = {
        text: loss(verifying["none"], verifying[text], resamples, seed) for text in dict.fromkeys([best, *compared])
    }
    return Proposal(best, horizon, tried[best], verified[best], tried, {text: verified[text] for text in compared})


def loss(unpruned: Mapping[str, Samples], pruned: Mapping[str, Samples], resamples: int, seed: int) -> Loss:
    """The relative loss of the unpruned scores; tasks on which the unpruned model scores 0 are left out.

    Raises:
        InformationError: the unpruned model scores 0 on every task.
    """
    random = np.random.default_rng(seed)
    draws = {task: resampled([samples, pruned[task]], resamples, random) for task, samples in unpruned.items()}
    resampled_ratios = mean_ratio({t: d[:, 1] for t, d in draws.items()}, {t: d[:, 0] for t, d in draws.items()})
    full_scores = {task: np.array([samples.score]) for task, samples in unpruned.items()}
    if not any(score[0] > 0 for score in full_scores.values()):
        raise InformationError("the unpruned model scores nothing on any of the tasks, so no loss can be measured.")
    value = mean_ratio({task: np.array([samples.score]) for task, samples in pruned.items()}, full_scores)
    low, high = np.nanquantile(100 - resampled_ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Loss(float(100 - value[0]), float(low), float(high))
