"""At which lengths of answer a schedule is worth it, from measured times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lmms_prune.bench.schedules import ScheduleTiming

WORTH = 1.1  # a speed-up below which pruning is hardly worth its loss


@dataclass(frozen=True)
class BreakEven:
    """Where the speed-up crosses `WORTH`, by straight lines through the times of the answers' lengths.

    Args:
        gain: at which lengths the speed-up is `WORTH` or more: "always", "never", "until" a length, "from" a length on;
            "unknown" if a single length was timed.
        new_tokens: that length; None where there is none.
    """

    gain: Literal["always", "never", "until", "from", "unknown"]
    new_tokens: float | None = None

    def __str__(self) -> str:
        if self.new_tokens is None:
            return "-" if self.gain == "unknown" else self.gain
        return f"{'to' if self.gain == 'until' else self.gain} {self.new_tokens:.0f}"


def break_even(pruned: Sequence[ScheduleTiming], whole: Sequence[ScheduleTiming]) -> BreakEven:
    """The lengths of answer, from one new token, at which a schedule is at least `WORTH` times as fast.

    Args:
        pruned, whole: of one batch and text length, and of the same numbers of new tokens.
    """
    if len(pruned) < 2:
        return BreakEven("unknown")

    def line(points: Sequence[ScheduleTiming]) -> tuple[float, float]:
        slope, start = np.polyfit([p.case.new_tokens for p in points], [p.seconds for p in points], 1)
        return float(slope), float(start)

    (slope, start), (whole_slope, whole_start) = line(pruned), line(whole)
    # Seconds that are left beyond those that `WORTH` asks for: at no new token, and what each of them adds.
    spare, more = whole_start - WORTH * start, whole_slope - WORTH * slope
    if spare + more >= 0:
        return BreakEven("always") if more >= 0 else BreakEven("until", -spare / more)
    return BreakEven("never") if more <= 0 else BreakEven("from", -spare / more)
