"""How long the information of all visual tokens takes, beside one full run for each, in the same process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmms_prune.bench.clock import median_seconds
from lmms_prune.bench.models import random_inputs
from lmms_prune.information.measure import measure
from lmms_prune.pruning.hooks import prune
from lmms_prune.schedule import Schedule


@dataclass(frozen=True)
class InformationTiming:
    """One prompt, measured at some layers.

    Args:
        layers: how many.
        units: visual tokens, or blocks of them, each at every layer.
        seconds: of all of them together: the median of some measurements.
        run_seconds: for each layer, the median of some full runs that cut to one unit there.
    """

    layers: int
    units: int
    seconds: float
    run_seconds: Sequence[float]

    @property
    def runs_seconds(self) -> float:
        """What one full run for each unit and layer would take, all of a layer being alike."""
        return self.units * sum(self.run_seconds)

    @property
    def ratio(self) -> float:
        """How many times faster than full runs."""
        return self.runs_seconds / self.seconds


def time_information(
    model: Any, layers: Sequence[int], block: int, grid: tuple[int, int] | None, text_tokens: int, repeats: int
) -> InformationTiming:
    """Time `measure` on a random prompt, and full runs of it that are pruned to one unit at each of the layers.

    Runs at one layer differ in which tokens they keep, not in what they compute, so that a few of them are timed.

    Args:
        model: a loaded checkpoint of either family.
        layers: at which to measure.
        block: side of a unit.
        grid: rows and columns of the image's visual tokens; None where the model has only one size.
        text_tokens: of the prompt.
        repeats: measurements, and runs at each layer, of which medians count.

    Raises:
        BenchError, InformationError, ScheduleError: what cannot be measured.
    """
    inputs = random_inputs(model, 1, grid, text_tokens)
    device = inputs["input_ids"].device
    answer = int(inputs["input_ids"][0, -1])
    made = measure(model, inputs, answer, [], block).units

    def whole() -> None:
        for _ in measure(model, inputs, answer, layers, block).layers:
            pass

    @torch.no_grad()
    def one(schedule: Schedule) -> None:
        with prune(model, schedule):
            model(**inputs, logits_to_keep=1)

    seconds = median_seconds(whole, repeats, device)
    schedules = [Schedule.parse(f"random@{layer}:{len(made[0].tokens)}t") for layer in layers]
    runs = [median_seconds(lambda: one(schedule), repeats, device) for schedule in schedules]  # noqa: B023
    return InformationTiming(len(layers), len(made), seconds, runs)
