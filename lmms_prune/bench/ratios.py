"""Ratios of measured times: their intervals, and the marks of those that are no result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

WIDE = 0.2  # half an interval, relative to its ratio, beyond which the ratio is marked
ABOVE = 1.1  # the realised fraction of the ideal beyond which it is marked

SIGNS = {"wide": "~", "above": "!", "once": "?"}
MEANINGS = {
    "wide": f"the 95 % interval is wider than ±{WIDE:.0%}: repeat with more --repeats on an idle machine",
    "above": f"above {ABOVE:.0%} of what the FLOPs allow, so rarely true: repeat with more --repeats on an idle machine",
    "once": "one run, so no interval: repeat with more --repeats",
}


@dataclass(frozen=True)
class Ratio:
    """A ratio of times.

    Args:
        value: the ratio.
        low, high: its 95 % bootstrap interval over the repeats; both are the ratio if there was one run.
        marks: keys of `MEANINGS`, for a ratio that is no result.
    """

    value: float
    low: float
    high: float
    marks: tuple[str, ...]


def ratio(
    statistic: Callable[..., Any], *series: Sequence[float], paired: bool = True, ideal: float | None = None
) -> Ratio:
    """Return a ratio with its interval and its marks. Every part of the benchmark marks its ratios here.

    Args:
        statistic: gets one array per series and the keyword ``axis`` of the repeats; returns the ratio.
        series: the repeats of each quantity.
        paired: whether repeats with the same number were measured in turn, so they are drawn together.
        ideal: the ratio that the FLOPs promise, if they promise one.
    """
    value = float(statistic(*map(np.array, series), axis=-1))
    low, high = interval(statistic, *series, paired=paired)
    marks = []
    if min(map(len, series)) == 1:
        marks.append("once")
    elif not (high - value <= WIDE * value and value - low <= WIDE * value):
        marks.append("wide")
    if ideal is not None and value > ABOVE * ideal:
        marks.append("above")
    return Ratio(value, low, high, tuple(marks))


def interval(statistic: Callable[..., Any], *series: Sequence[float], paired: bool = True) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a statistic of one or more series."""
    if min(map(len, series)) == 1:
        value = float(statistic(*map(np.array, series), axis=-1))
        return value, value
    rng = np.random.default_rng(0)
    drawn = stats.bootstrap(series, statistic, paired=paired, method="percentile", rng=rng)
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def of_medians(own: Any, other: Any, axis: int) -> Any:
    """Return the ratio of two medians, a statistic for `ratio`."""
    return np.median(own, axis) / np.median(other, axis)


def merged(marks: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Return the marks of a figure that is computed from several marked ones."""
    present = {mark for figure in marks for mark in figure}
    return tuple(mark for mark in SIGNS if mark in present)


def signs(marks: Sequence[str]) -> str:
    """Return what is printed behind a marked ratio."""
    return "".join(SIGNS[mark] for mark in marks)


def legend(marks: Iterable[Sequence[str]]) -> list[str]:
    """Return one line for each mark that occurs: its sign, what it means and what to do."""
    return [f"{SIGNS[mark]} {MEANINGS[mark]}" for mark in merged(marks)]
