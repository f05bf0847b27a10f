"""From the finding to a schedule: which hybrid loses least at a budget, chosen on some documents, checked on others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lmms_prune.errors import ScheduleError
from lmms_prune.information.horizon import EPSILON
from lmms_prune.information.layer_sweep import Evaluation, acts_at, evaluate
from lmms_prune.leaderboard.samples import Samples
from lmms_prune.leaderboard.statistics import CONFIDENCE, mean_ratio, resampled
from lmms_prune.record.information import InformationError
from lmms_prune.schedule import Budget, PromptSizes, Schedule
from lmms_prune.sweep.run import JobOutcome

DEEP = (0.0, 0.05, 0.15)  # ratios kept past the horizon
TRIED = 8  # layers at which removal is tried


@dataclass(frozen=True)
class Loss:
    """What a schedule loses of the unpruned scores, in percent: the mean over tasks, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Proposal:
    """The schedule that lost least.

    Args:
        schedule: with every ``?`` solved.
        horizon: the layer from which removing all visual tokens costs next to nothing.
        chosen: its loss on the documents it was chosen on: too good, because it was chosen by it.
        verified: its loss on other documents; what to expect.
        tried: each candidate and its loss, the best first.
        beside: schedules that were given for comparison, with their loss on the same other documents.
    """

    schedule: str
    horizon: int
    chosen: Loss
    verified: Loss
    tried: Mapping[str, Loss]
    beside: Mapping[str, Loss]


def candidates(methods: Sequence[str], horizons: Sequence[int], budget: Budget | str, sizes: PromptSizes) -> list[str]:
    """Hybrids that meet a budget, with their ``?`` solved.

    A method acts early (at the first layer it can, and at an eighth of the depth); at a horizon random tokens remain, or
    none. Where a budget is more than all of these need, all tokens stay until a horizon, or one method prunes alone.

    Args:
        methods: that act early.
        horizons: possible layers of the deep stage; at the depth or beyond there is none.
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
    made, problem = _solved(hybrids, budget, sizes)
    if not made:
        made, _ = _solved(ample, budget, sizes)
    if not made:
        raise InformationError(f"--budget {budget}: no candidate meets it. The last one: {problem}")
    return made


def _solved(texts: Sequence[str], budget: Budget | str, sizes: PromptSizes) -> tuple[list[str], str]:
    """Those schedules that can meet a budget, once each, and why the last of the others cannot."""
    made: dict[str, None] = {}
    problem = ""
    for text in texts:
        try:
            made[str(Schedule.parse(text).solve(budget, sizes))] = None
        except ScheduleError as error:
            problem = str(error)
    return list(made), problem


def removal_horizon(
    evaluation: Evaluation, first: int, depth: int, out: Path, launch: str, report: Callable[[JobOutcome], None]
) -> int:
    """The layer from which on removing all visual tokens loses at most EPSILON, among TRIED layers from `first` on.

    The depth, if even the deepest of them loses more.
    """
    layers = sorted({round(float(n)) for n in np.linspace(first, depth - 1, TRIED)}) if first < depth else []
    if not layers:
        return depth
    scores = evaluate(evaluation, ["none", *(f"vtw@{n}" for n in layers)], out, launch, report)
    found = depth
    for layer in reversed(layers):
        if loss(scores["none"], scores[f"vtw@{layer}"], 100, 0).value > 100 * EPSILON:
            break
        found = layer
    return found


def propose(
    evaluation: Evaluation,
    texts: Sequence[str],
    horizon: int,
    out: Path,
    launch: str,
    report: Callable[[JobOutcome], None],
    beside: Sequence[str] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> Proposal:
    """Evaluate candidates on the first documents of each task, and the best one on the next as many.

    Args:
        evaluation: with a limit; as many documents after these must be there.
        texts: as `candidates` makes them.
        horizon: as `removal_horizon` finds it, for the record.
        out: folder of the runs; complete ones are not done again.
        launch, report: as for `evaluate`.
        beside: further schedules to evaluate on the next documents.
        resamples, seed: of the bootstrap.
    """
    assert evaluation.limit is not None
    scores = evaluate(evaluation, ["none", *texts], out / "chosen", launch, report)
    tried = {text: loss(scores["none"], scores[text], resamples, seed) for text in texts}
    tried = dict(sorted(tried.items(), key=lambda item: item[1].value))
    best = next(iter(tried))
    others = replace(evaluation, offset=evaluation.offset + evaluation.limit)
    again = evaluate(others, list(dict.fromkeys(["none", best, *beside])), out / "verified", launch, report)
    there = {text: loss(again["none"], again[text], resamples, seed) for text in dict.fromkeys([best, *beside])}
    return Proposal(best, horizon, tried[best], there[best], tried, {text: there[text] for text in beside})


def loss(unpruned: Mapping[str, Samples], pruned: Mapping[str, Samples], resamples: int, seed: int) -> Loss:
    """What is lost of the unpruned scores; tasks on which the unpruned model scores nothing do not count.

    Raises:
        InformationError: it scores nothing on any.
    """
    random = np.random.default_rng(seed)
    draws = {task: resampled([samples, pruned[task]], resamples, random) for task, samples in unpruned.items()}
    many = mean_ratio({t: d[:, 1] for t, d in draws.items()}, {t: d[:, 0] for t, d in draws.items()})
    whole = {task: np.array([samples.score]) for task, samples in unpruned.items()}
    if not any(score[0] > 0 for score in whole.values()):
        raise InformationError("the unpruned model scores nothing on any of the tasks, so no loss can be measured.")
    value = mean_ratio({task: np.array([samples.score]) for task, samples in pruned.items()}, whole)
    low, high = np.nanquantile(100 - many, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Loss(float(100 - value[0]), float(low), float(high))
