"""Time of measuring the information of all visual tokens, compared with one full run for each, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from lmms_prune.bench.clock import timed
from lmms_prune.bench.models import random_inputs
from lmms_prune.bench.ratios import ratio
from lmms_prune.information.measure import measure
from lmms_prune.pruning.hooks import prune
from lmms_prune.schedule import Schedule


@dataclass(frozen=True)
class InformationTiming:
    """Timing of one prompt's information at several layers.

    Args:
        layers: number of layers.
        units: number of visual tokens, or of blocks of them, measured at every layer.
        seconds: median seconds of measuring all units at all layers.
        run_seconds: for each layer, median seconds of a full run that prunes to one unit there.
        low, high: 95 % bootstrap interval of `ratio`.
        marks: of the ratio, if it is no result; see `lmms_prune.bench.ratios`.
    """

    layers: int
    units: int
    seconds: float
    run_seconds: Sequence[float]
    low: float
    high: float
    marks: tuple[str, ...]

    @property
    def runs_seconds(self) -> float:
        """Return the seconds of one full run for each unit and layer; runs of one layer take equally long."""
        return self.units * sum(self.run_seconds)

    @property
    def ratio(self) -> float:
        """Return how many times faster the measurement is than full runs."""
        return self.runs_seconds / self.seconds


def time_information(
    model: Any,
    layers: Sequence[int],
    block: int,
    grid: tuple[int, int] | None,
    text_tokens: int,
    repeats: int,
    counted: Callable[[int, int], None] = lambda done, total: None,
) -> InformationTiming:
    """Time `measure` on a random prompt, and full runs of it that are pruned to one unit at each of the layers.

    Runs at one layer differ in the tokens they keep, not in how many, so timing a few of them is enough.

    Args:
        model: a loaded checkpoint of either family.
        layers: the layers to measure at.
        block: side of a unit, in visual tokens.
        grid: rows and columns of the image's visual tokens; None if the model has a fixed size.
        text_tokens: text tokens of the prompt.
        repeats: number of measurements, and of runs at each layer; medians are reported.
        counted: called with the number of layers that were measured or run, and of all.

    Raises:
        BenchError, InformationError, ScheduleError: the model, grid or layers cannot be measured.
    """
    inputs = random_inputs(model, 1, grid, text_tokens)
    device = inputs["input_ids"].device
    answer = int(inputs["input_ids"][0, -1])
    units = measure(model, inputs, answer, [], block).units

    def all_layers() -> None:
        for _ in measure(model, inputs, answer, layers, block).layers:
            pass

    @torch.no_grad()
    def full_run(schedule: Schedule) -> None:
        with prune(model, schedule):
            model(**inputs, logits_to_keep=1)

    seconds = timed(all_layers, repeats, device)
    schedules = [Schedule.parse(f"random@{layer}:{len(units[0].tokens)}t") for layer in layers]
    runs: list[list[float]] = []
    for schedule in schedules:
        counted(len(layers) + len(runs), 2 * len(layers))
        runs.append(timed(lambda: full_run(schedule), repeats, device))  # noqa: B023

    def times_as_fast(measuring: Any, *full_runs: Any, axis: int) -> Any:
        return len(units) * sum(np.median(run, axis) for run in full_runs) / np.median(measuring, axis)

    gain = ratio(times_as_fast, seconds, *runs, paired=False)
    return InformationTiming(
        len(layers), len(units), median(seconds), [median(run) for run in runs], gain.low, gain.high, gain.marks
    )
