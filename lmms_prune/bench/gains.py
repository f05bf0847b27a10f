"""The answer lengths at which a schedule is worthwhile, from measured times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lmms_prune.bench.ratios import merged
from lmms_prune.bench.schedules import ScheduleTiming

WORTH = 1.1  # the least speed-up that is worth the loss in accuracy


@dataclass(frozen=True)
class BreakEven:
    """The answer length at which the speed-up crosses `WORTH`, by straight lines fitted to the times.

    Args:
        gain: the lengths at which the speed-up is at least `WORTH`: "always", "never", "until" or "from" a length;
            "unknown" if only one length was timed.
        new_tokens: that length; None if there is none.
        marks: of the timings that it is computed from; see `lmms_prune.bench.ratios`.
    """

    gain: Literal["always", "never", "until", "from", "unknown"]
    new_tokens: float | None = None
    marks: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.new_tokens is None:
            return "-" if self.gain == "unknown" else self.gain
        return f"{'to' if self.gain == 'until' else self.gain} {self.new_tokens:.0f}"


def break_even(pruned: Sequence[ScheduleTiming], unpruned: Sequence[ScheduleTiming]) -> BreakEven:
    """Find the answer lengths, from one new token on, at which a schedule is at least `WORTH` times as fast.

    Args:
        pruned, unpruned: timings of one batch and text length, for the same numbers of new tokens.
    """
    if len(pruned) < 2:
        return BreakEven("unknown")

    def line(points: Sequence[ScheduleTiming]) -> tuple[float, float]:
        slope, start = np.polyfit([p.case.new_tokens for p in points], [p.seconds for p in points], 1)
        return float(slope), float(start)

    (slope, start), (unpruned_slope, unpruned_start) = line(pruned), line(unpruned)
    # Seconds saved beyond what `WORTH` requires: with no new token, and per new token.
    spare_at_zero, spare_per_token = unpruned_start - WORTH * start, unpruned_slope - WORTH * slope
    marks = merged(timing.marks for timing in pruned)
    if spare_at_zero + spare_per_token >= 0 and spare_per_token >= 0:
        return BreakEven("always", marks=marks)
    if spare_at_zero + spare_per_token < 0 and spare_per_token <= 0:
        return BreakEven("never", marks=marks)
    gain: Literal["until", "from"] = "until" if spare_per_token < 0 else "from"
    return BreakEven(gain, -spare_at_zero / spare_per_token, marks)
