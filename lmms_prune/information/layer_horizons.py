"""The work of ``lmms-prune horizon``: measures information, evaluates schedules at every layer, and finds each task's horizon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from lmms_prune.information.aggregate import by_sample
from lmms_prune.information.horizon import Horizon, find_horizon
from lmms_prune.information.layer_sweep import Evaluation, acts_at, evaluate, run_all, single_stage
from lmms_prune.information.options import depth_and_name, load_unpruned, measured_rows
from lmms_prune.information.part import MeasureRequest, measure_launched, measure_part
from lmms_prune.information.plots import draw_horizon, draw_horizons, draw_methods, task_title
from lmms_prune.leaderboard.samples import Samples
from lmms_prune.leaderboard.statistics import interval, resampled
from lmms_prune.methods import METHODS
from lmms_prune.record.files import write
from lmms_prune.terminal.progress import Progress

SingleStage = tuple[str, int, float | str]
"""A method with its options, a layer, and what is kept from that layer on."""
Scores = Mapping[str, Mapping[str, Samples]]
"""The samples of every schedule, by schedule and task."""


@dataclass(frozen=True)
class HorizonRequest:
    """What horizons are found from.

    Args:
        measure: the information to measure; its part is also the part of the evaluations.
        evaluation: the model and the documents of the scores.
        methods, keeps: evaluated as the only stage at each layer, besides the removal of all visual tokens.
        out: folder of the results.
        scores_only: whether horizons are found without information.
        partial: whether information is measured on fewer documents than the scores.
        epsilon, resamples, seed: as for `find_horizon`.
        launch: the launcher of measuring and evaluating processes.
    """

    measure: MeasureRequest
    evaluation: Evaluation
    methods: Sequence[str]
    keeps: Sequence[float | str]
    out: Path
    scores_only: bool
    partial: bool
    epsilon: float
    resamples: int
    seed: int
    launch: str

    @cached_property
    def oracles(self) -> list[str]:
        """Those of the methods that read measured information."""
        return [method for method in self.methods if is_oracle(method)]

    def stages(self, depth: int) -> dict[SingleStage, str]:
        """The schedules with one method as the only stage, at every layer at which it can act."""
        stages = [(m, n, k) for k in self.keeps for m in self.methods for n in range(depth) if acts_at(m, n)]
        return {stage: _text(*stage, self.measure.out) for stage in stages}

    def schedules(self, depth: int) -> list[str]:
        """All schedules, each once."""
        removed = [f"vtw@{layer}" for layer in range(depth)]
        return list(dict.fromkeys(["none", *removed, *self.stages(depth).values()]))

    def part(self, depth: int) -> list[str]:
        """The schedules of this part. An oracle reads the measurements of all parts, so it runs when they are collected."""
        prefixes = tuple(f"{name}@" for name in self.oracles)
        own = [text for text in self.schedules(depth) if not text.startswith(prefixes)]
        number, parts = self.measure.shard
        return own[number - 1 :: parts]


def is_oracle(method: str) -> bool:
    """Whether a method, named with options or without, is an oracle; none of one's own is."""
    name = method.partition(";")[0]
    return name in METHODS and METHODS[name].kind == "oracle"


def _text(method: str, layer: int, keep: float | str, measured: Path) -> str:
    """The schedule of a single stage; an oracle reads the measurements in `measured`."""
    text = single_stage(method, layer, keep)
    return f"{text};of={measured}" if is_oracle(method) else text


def evaluate_part(request: HorizonRequest) -> tuple[int, tuple[int, int]]:
    """Evaluate and measure one part of the work.

    Returns:
        the number of evaluated schedules, and what `measure_part` returns.

    Raises:
        InformationError and others: as for `run_all` and `measure_part`.
    """
    depth, _ = depth_and_name(request.measure.model, request.measure.model_args)
    schedules, evaluation = request.part(depth), request.evaluation
    with Progress("evaluations", len(schedules) * len(evaluation.tasks)) as progress:
        run_all(evaluation, schedules, request.out, request.launch, lambda outcome: progress.advance())
    return len(schedules), (0, 0) if request.scores_only else measure_part(request.launch, request.measure)


def averages_of(request: HorizonRequest) -> tuple[int, str, pd.DataFrame | None]:
    """Measure the information that is missing.

    Returns:
        the model's number of layers, its name, and the output of `by_sample`; None if only scores count.
    """
    measure = request.measure
    if request.scores_only:
        return (*depth_and_name(measure.model, measure.model_args), None)
    if request.launch:
        measure_launched(request.launch, measure)
    loaded, choice = load_unpruned(measure.model, measure.model_args), measure.choice
    where = (measure.block, choice.include, measure.out, choice.draw, measure.label)
    return loaded.depth, loaded.name, by_sample(measured_rows(loaded, list(choice.tasks), choice.limit, *where))


def scores_of(request: HorizonRequest, depth: int) -> Scores:
    """Evaluate every schedule on every task; complete results are reused."""
    schedules, evaluation = request.schedules(depth), request.evaluation
    with Progress("evaluations", len(schedules) * len(evaluation.tasks)) as progress:
        return evaluate(evaluation, schedules, request.out, request.launch, lambda outcome: progress.advance())


def write_horizons(
    request: HorizonRequest, depth: int, model: str, averages: pd.DataFrame | None, scores: Scores
) -> list[Horizon]:
    """Find each task's horizon, and write tables and plots of it and of the methods.

    Args:
        request: what was asked for.
        depth, model: the model's number of layers, and its name.
        averages: the output of `averages_of`.
        scores: the output of `scores_of`.
    """
    horizons, stages, out = [], request.stages(depth), request.out
    for task in request.evaluation.tasks:
        removed = {layer: scores[f"vtw@{layer}"][task] for layer in range(depth)}
        lines = None if averages is None else averages[averages.task == task]
        rule = (request.epsilon, request.resamples, request.seed, request.partial)
        horizon = find_horizon(task, lines, scores["none"][task], removed, *rule)
        horizons.append(horizon)
        title = f"{model}, {task_title(task)}: {horizon.units} scored units"
        draw_horizon(horizon, title, out / f"horizon-{task}")
        write(out / f"horizon-{task}.csv", horizon.layers.to_csv(index=False))
        if stages:
            table = _method_lines(task, stages, scores, request.resamples, request.seed)
            write(out / f"methods-{task}.csv", table.to_csv(index=False))
            draw_methods(table, scores["none"][task].score, title, out / f"methods-{task}")
    draw_horizons(horizons, f"{model}: score without visual tokens, and horizons", out / "horizons")
    return horizons


def _method_lines(
    task: str, stages: Mapping[SingleStage, str], scores: Scores, resamples: int, seed: int
) -> pd.DataFrame:
    """The scores of all single-stage schedules on one task with their 95 % intervals, one line each."""
    runs = {stage: scores[text][task] for stage, text in stages.items()}
    # All runs on the same draws: the bands of two methods move together.
    draws = resampled(list(runs.values()), resamples, np.random.default_rng(seed))
    lines = []
    for ((m, n, k), run), drawn in zip(runs.items(), draws.T, strict=True):
        name = f"{m} (oracle)" if is_oracle(m) else m
        span = interval(run.score, drawn)
        lines.append({"method": name, "layer": n, "keep": k, "score": run.score, "low": span.low, "high": span.high})
    return pd.DataFrame(lines)
